"""The check for phrases finds them with their lines, and nothing else."""

import pytest

from tools import phrases


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("plain text about the center", []),
        ("one\nThe Colour of it", [(2, "Colour")]),
        ("# ends with of\n# ours and goes on", [(1, "of ours")]),
        ("a\n    def _normalised(x):", [(2, "_normalised")]),
        ("besides, everybody reads words", []),
        ('Gouk et al., "Regularisation of neural networks"', []),
        (
            "regularisation, penalised;\nat  hand",
            [(1, "regularisation"), (1, "penalised"), (2, "at hand")],
        ),
        ("precise, otherwise, promise, exercise, revised, labels, gradient", []),
    ],
)
def test_phrases_are_found_with_their_lines(text, found):
    assert list(phrases.find(text)) == found


def test_the_program_fails_with_file_and_line(tmp_path, capsys):
    path = tmp_path / "page.md"
    path.write_text("fine\n")
    assert phrases.main([str(path)]) == 0 and capsys.readouterr().out == ""
    path.write_text("fine\nLikewise\n")
    assert phrases.main([str(path)]) == 1
    assert f"{path}:2: Likewise" in capsys.readouterr().out


def test_all_kinds_of_files_are_read():
    names = {str(path.relative_to(phrases.ROOT)) for path in phrases.files()}
    assert names >= {"README.md", "setup.cfg", "Makefile", "keras_lipattn/__init__.py", ".ci/run"}
    assert not any(name.startswith((".venv", "build")) for name in names)
