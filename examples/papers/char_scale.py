"""Character-level language models of a million weights, and of one to four layers.

The variants of `char_lm.py` at fourteen times its number of weights and twice its context, one
pass over the text, one seed each. Then models of the size of `char_lm.py` with one to four
layers: does contractive attention stop gaining from more layers earlier?

    python examples/papers/char_scale.py                        # Python's documentation, small
    python examples/papers/char_scale.py --full                 # Penn Treebank, with LIPATTN_DATA

An interrupted run goes on where it was when the same command is given again.

Reference:
    Kim, Papamakarios, Mnih, "The Lipschitz constant of self-attention", ICML 2021, Section 5.3.
"""

import pathlib
import typing

import char_model
import corpora
import report
from char_lm import chosen_rate
from char_model import Size
from char_training import Kept, Plan, certificates, finite_or_none, nats_per_character, train

VARIANTS = (
    "dot_product, relative",
    "contractive, bounded tokens",
    "l2, relative",
    "contractive, our bound",
    "dot_product",
)
COLORS = dict(zip(VARIANTS, ("C0", "C1", "C2", "C3", "C7"), strict=True))
LAYERED = VARIANTS[:2]


class Setting(typing.NamedTuple):
    """One size of the experiment.

    Attributes:
        size: the large models.
        plan: their training.
        rates: learning rates to choose from.
        tuning_steps: steps of a run that chooses, a tenth of them warm-up; 0 for the first rate.
        layered_size: the models of growing depth, but for `layers`.
        layered_plan: their training.
        layered_rate: their learning rate.
        depths: numbers of layers.
    """

    size: Size
    plan: Plan
    rates: tuple[float, ...]
    tuning_steps: int
    layered_size: Size
    layered_plan: Plan
    layered_rate: float
    depths: tuple[int, ...]


SMALL = Setting(
    size=Size(layers=1, width=48, heads=4, context=32),
    plan=Plan(batch=8, steps=60, warm_up=10),
    rates=(0.01,),
    tuning_steps=0,
    layered_size=Size(layers=0, width=24, heads=2, context=24),
    layered_plan=Plan(batch=8, steps=40, warm_up=5),
    layered_rate=0.01,
    depths=(1, 2),
)
FULL = Setting(
    size=Size(layers=2, width=192, heads=8, context=128),
    # The 5,017,482 characters of Penn Treebank.
    plan=Plan(batch=16, steps=2450, warm_up=250),
    rates=(0.003, 0.01),
    tuning_steps=500,
    layered_size=Size(layers=0, width=48, heads=8, context=64),
    layered_plan=Plan(batch=16, steps=3000, warm_up=300),
    layered_rate=0.01,
    depths=(1, 2, 3, 4),
)


def compute(name: str, setting: Setting, kept: Kept) -> dict:
    """All runs of a setting on one text."""
    corpus = corpora.load(name)
    tuning = [
        kept.run(f"tuning {variant} {rate}", tuning_run, variant, rate, setting, corpus)
        for variant in VARIANTS
        for rate in setting.rates
        if setting.tuning_steps
    ]
    runs = [
        kept.run(f"run {variant}", large_run, variant, tuning, setting, corpus)
        for variant in VARIANTS
    ]
    layered = [
        kept.run(f"layers {variant} {depth}", layered_run, variant, depth, setting, corpus)
        for variant in LAYERED
        for depth in setting.depths
    ]
    return {
        "corpus": name,
        "characters": [len(corpus.train), len(corpus.valid), len(corpus.test)],
        "setting": setting._asdict(),
        "seconds": sum(run["seconds"] for run in (*tuning, *runs, *layered)),
        "tuning": tuning,
        "runs": runs,
        "layered": layered,
    }


def tuning_run(variant, rate, setting, corpus):
    """A short run."""
    steps = setting.tuning_steps
    plan = setting.plan._replace(steps=steps, warm_up=steps // 10)
    model, _ = train(variant, setting.size, corpus, plan, rate, seed=1000)
    nats = nats_per_character(model, corpus.valid[:50_000])
    return {"variant": variant, "rate": rate, "valid_nats": finite_or_none(nats)}


def large_run(variant, tuning, setting, corpus):
    """A large model at the rate that was best on the validation text, trained and tested."""
    rate = chosen_rate(tuning, variant, setting)
    model, curve = train(variant, setting.size, corpus, setting.plan, rate, seed=0)
    found = certificates(model)
    return {
        "variant": variant,
        "rate": rate,
        "parameters": char_model.trainable_weights(model),
        "curve": curve,
        "test_nats": nats_per_character(model, corpus.test),
        "branches": [row["contraction"] for row in found["attention"] if "contraction" in row],
    }


def layered_run(variant, depth, setting, corpus):
    """A model of `depth` layers."""
    size = setting.layered_size._replace(layers=depth)
    model, _ = train(variant, size, corpus, setting.layered_plan, setting.layered_rate, seed=0)
    return {"variant": variant, "depth": depth, "test_nats": nats_per_character(model, corpus.test)}


def draw(results: dict, folder: pathlib.Path) -> None:
    """Curves, test loss over the number of layers, and the tables."""
    fig, axes = report.figure(2)
    for run in results["runs"]:
        steps = results["setting"]["plan"][1]
        points = [(point + 1) * steps / len(run["curve"]) for point in range(len(run["curve"]))]
        axes[0].plot(points, run["curve"], color=COLORS[run["variant"]], label=run["variant"])
    axes[0].set(xlabel="step", ylabel="training nats per character", title="A million weights")
    axes[0].legend(frameon=False, fontsize=8)
    depths = results["setting"]["depths"]
    rows = []
    for variant in LAYERED:
        nats = [row["test_nats"] for row in results["layered"] if row["variant"] == variant]
        axes[1].plot(depths, nats, "o-", color=COLORS[variant], label=variant)
        rows.append([variant, *(f"{value:.3f}" for value in nats)])
    axes[1].set(xlabel="layers", ylabel="test nats per character", title="One to four layers")
    axes[1].set_xticks(depths)
    axes[1].legend(frameon=False, fontsize=8)
    report.save(fig, folder, "char_scale")
    report.table("char_scale", folder, *_models_table(results))
    header = ["layers", *map(str, depths)]
    report.table("char_scale_layers", folder, header, rows)


def _models_table(results):
    rows = []
    for run in results["runs"]:
        tuned = ", ".join(
            f"{row['rate']:g}: "
            + ("diverged" if row["valid_nats"] is None else f"{row['valid_nats']:.3f}")
            for row in results["tuning"]
            if row["variant"] == run["variant"]
        )
        constants = ", ".join(f"{value:.3f}" for value in run["branches"])
        cells = [run["variant"], f"{run['parameters']:,}", tuned, f"{run['test_nats']:.3f}"]
        rows.append([*cells, constants, f"{run['seconds'] / 60:.0f}"])
    header = ["attention", "weights", "learning rate: validation nats of the short run"]
    header += ["test nats per character", "certified constants of the branches", "minutes"]
    return header, rows


def main(argv=None):
    options = report.arguments(__doc__, argv, corpus=corpora.NAMES)
    setting = FULL if options.full else SMALL
    name = options.corpus or ("ptb" if options.full else "pydoc")
    kept = Kept(options.folder / "char_scale.runs", [name, setting])
    report.produce("char_scale", options, lambda full: compute(name, setting, kept), draw)
    if not options.redraw:
        kept.path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
