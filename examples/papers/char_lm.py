"""Character-level language models with dot-product, L2 and contractive attention.

Transformers of the same width, depth and number of weights learn the same characters in the same
order: with `keras.layers.MultiHeadAttention`, with L2 attention of untied and of tied keys, both
kinds with biases by relative position too, and with invertible attention `x + c f(x) / bound`:
L2 attention with the published bound or ours, and dot products of bounded tokens with biases by
relative position, where each head starts at one distance. The last variant has no normalization
and contractive perceptrons as well, so that the constant of the whole model is small.
The learning rate of each is chosen by short runs on the validation text. A second experiment
trains deeper and deeper models at fixed learning rates, without warm-up.

    python examples/papers/char_lm.py                        # Python's documentation, small
    python examples/papers/char_lm.py --corpus shakespeare   # with LIPATTN_DATA
    python examples/papers/char_lm.py --full                 # Penn Treebank, with LIPATTN_DATA

An interrupted run goes on where it was when the same command is given again.

Reference:
    Kim, Papamakarios, Mnih, "The Lipschitz constant of self-attention", ICML 2021, Section 5.3.
"""

import math
import pathlib
import typing

import char_model
import corpora
import numpy as np
import report
from char_model import BOUNDED, CERTIFIED, TIED, VARIANTS, Size
from char_training import (
    Kept,
    Plan,
    certificates,
    finite_or_none,
    nats_per_character,
    train,
)

COLORS = dict(
    zip(
        VARIANTS,
        (
            "0.55",
            "black",
            "tab:green",
            "tab:cyan",
            "tab:blue",
            "tab:orange",
            "tab:red",
            "tab:olive",
            "tab:purple",
            "tab:brown",
        ),
        strict=True,
    )
)
DEPTH_VARIANTS = ("dot_product", "l2")
PROMPT = 16
TEMPERATURE = 0.7


class Setting(typing.NamedTuple):
    """One size of the experiment.

    Attributes:
        size: the models that are compared.
        plan: their training.
        rates: learning rates to choose from.
        tuning_steps: steps of a run that chooses, with as much of its warm-up as `plan` has.
        seeds: number of seeds.
        deep_size: the models of growing depth, but for `layers`.
        deep_plan: their training.
        deep_rates: their fixed learning rates.
        depths: numbers of layers.
    """

    size: Size
    plan: Plan
    rates: tuple[float, ...]
    tuning_steps: int
    seeds: int
    deep_size: Size
    deep_plan: Plan
    deep_rates: tuple[float, ...]
    depths: tuple[int, ...]


SMALL = Setting(
    size=Size(layers=2, width=48, heads=4, context=48),
    plan=Plan(batch=16, steps=300, warm_up=30),
    rates=(0.01,),
    tuning_steps=0,
    seeds=1,
    deep_size=Size(layers=0, width=24, heads=2, context=24),
    deep_plan=Plan(batch=8, steps=60, warm_up=0),
    deep_rates=(0.003,),
    depths=(2, 8),
)
FULL = Setting(
    size=Size(layers=2, width=48, heads=8, context=64),
    plan=Plan(batch=16, steps=10_000, warm_up=1000),
    rates=(0.003, 0.01, 0.03),
    tuning_steps=3000,
    seeds=3,
    deep_size=Size(layers=0, width=48, heads=4, context=32),
    deep_plan=Plan(batch=16, steps=300, warm_up=0),
    deep_rates=(0.001, 0.003),
    depths=(2, 6, 12, 18),
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
    # Seed by seed, so that what is there after an interruption can be compared.
    runs = [
        kept.run(
            f"run {variant} {seed}",
            final_run,
            variant,
            seed,
            chosen_rate(tuning, variant, setting),
            setting,
            corpus,
        )
        for seed in range(setting.seeds)
        for variant in VARIANTS
    ]
    deep = [
        kept.run(f"deep {variant} {depth} {rate}", deep_run, variant, depth, rate, setting, corpus)
        for rate in setting.deep_rates
        for depth in setting.depths
        for variant in DEPTH_VARIANTS
    ]
    return {
        "corpus": name,
        "characters": [len(corpus.train), len(corpus.valid), len(corpus.test)],
        "symbols": len(corpus.symbols),
        "frequencies": [corpora.frequency_nats(corpus, given) for given in (0, 1)],
        "setting": setting._asdict(),
        "seconds": sum(run["seconds"] for run in (*tuning, *runs, *deep)),
        "tuning": tuning,
        "runs": runs,
        "deep": deep,
    }


def chosen_rate(tuning, variant, setting):
    """The rate that was best on the validation text, the first one where nothing was tuned."""
    rows = [row for row in tuning if row["variant"] == variant and row["valid_nats"] is not None]
    best = min(rows, key=lambda row: row["valid_nats"], default={"rate": setting.rates[0]})
    return best["rate"]


def tuning_run(variant, rate, setting, corpus):
    """A short run; its warm-up is the same share of it."""
    steps = setting.tuning_steps
    warm_up = max(1, setting.plan.warm_up * steps // setting.plan.steps)
    plan = setting.plan._replace(steps=steps, warm_up=warm_up)
    model, _ = train(variant, setting.size, corpus, plan, rate, seed=1000)
    nats = nats_per_character(model, corpus.valid[:50_000])
    return {"variant": variant, "rate": rate, "valid_nats": finite_or_none(nats)}


def final_run(variant, seed, rate, setting, corpus):
    """A model trained, tested, certified, and asked for a text where its attention has a cache."""
    model, curve = train(variant, setting.size, corpus, setting.plan, rate, seed)
    result = {
        "variant": variant,
        "seed": seed,
        "rate": rate,
        "parameters": char_model.trainable_weights(model),
        "curve": curve,
        "test_nats": nats_per_character(model, corpus.test),
        "certificates": certificates(model),
    }
    if variant in TIED:
        prompt = corpus.test[None, :PROMPT]
        options = {"temperature": TEMPERATURE, "seed": seed}
        text, logits = char_model.generate(model, prompt, setting.size.context, **options)
        result["sample"] = corpus.text(text[0])
        difference = np.abs(logits - np.asarray(model(text))[:, :-1]).max()
        result["decoding_error"] = float(difference)
    return result


def deep_run(variant, depth, rate, setting, corpus):
    """A deep model at a fixed rate from the first step on."""
    size = setting.deep_size._replace(layers=depth)
    _, curve = train(variant, size, corpus, setting.deep_plan, rate, seed=0)
    end = float(np.mean(curve[-4:]))
    return {"variant": variant, "depth": depth, "rate": rate, "nats": finite_or_none(end)}


def draw(results: dict, folder: pathlib.Path) -> None:
    """Curves, bars, depths, and the tables."""
    fig, axes = report.figure(3)
    _draw_curves(axes[0], results)
    _draw_bars(axes[1], results)
    _draw_depths(axes[2], results)
    report.save(fig, folder, "char_lm")
    report.table("char_lm", folder, *_models_table(results))
    report.table("char_lm_differences", folder, *_differences_table(results))
    report.table("char_lm_bounds", folder, *_bounds_table(results))
    report.table("char_lm_deep", folder, *_depths_table(results))
    report.table("char_lm_samples", folder, *_samples_table(results))


def _runs(results, variant):
    return [run for run in results["runs"] if run["variant"] == variant]


def _nats(results, variant):
    return np.array([run["test_nats"] for run in _runs(results, variant)])


def _draw_curves(axis, results):
    for variant in VARIANTS:
        curves = np.array([run["curve"] for run in _runs(results, variant)])
        points = np.arange(1, curves.shape[1] + 1)
        steps = points * results["setting"]["plan"][1] / curves.shape[1]
        mean = curves.mean(axis=0)
        axis.plot(steps, mean, color=COLORS[variant], linewidth=1.3, label=variant)
        axis.fill_between(
            steps, curves.min(axis=0), curves.max(axis=0), color=COLORS[variant], alpha=0.2
        )
    axis.set(xlabel="step", ylabel="training nats per character", title="Learning curves")
    # Room for the names above the curves.
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.5 * (high - low))
    axis.legend(frameon=False, fontsize=7, ncols=2)


def _draw_bars(axis, results):
    for index, variant in enumerate(VARIANTS):
        nats = _nats(results, variant)
        axis.bar(index, nats.mean(), color=COLORS[variant], alpha=0.6, width=0.7)
        axis.plot([index] * len(nats), nats, "k_", markersize=14)
        axis.annotate(
            f"{nats.mean():.3f}",
            (index, nats.max()),
            (0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    axis.set_xticks(range(len(VARIANTS)), VARIANTS, fontsize=8, rotation=30, ha="right")
    axis.set(ylabel="test nats per character", title="Test, one mark for each seed")
    axis.margins(y=0.12)


def _draw_depths(axis, results):
    for style, rate in zip(("-", "--", ":"), results["setting"]["deep_rates"], strict=False):
        for variant in DEPTH_VARIANTS:
            rows = [
                row
                for row in results["deep"]
                if row["variant"] == variant and row["rate"] == rate and row["nats"] is not None
            ]
            axis.plot(
                [row["depth"] for row in rows],
                [row["nats"] for row in rows],
                style,
                color=COLORS[variant],
                marker="o",
                markersize=4,
                label=f"{variant}, rate {rate:g}",
            )
    axis.set(
        xlabel="layers",
        ylabel="training nats per character at the end",
        title="Fixed learning rate, no warm-up",
    )
    axis.set_xticks(results["setting"]["depths"])
    axis.legend(frameon=False, fontsize=8)


def _spread(values, digits=4):
    mean = f"{np.mean(values):.{digits}f}"
    return f"{mean} +- {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else mean


def _models_table(results):
    rows = [
        [f"frequencies of {what}", "", "", f"{nats:.4f}", f"{nats / math.log(2.0):.4f}", ""]
        for what, nats in zip(("characters", "pairs"), results["frequencies"], strict=True)
    ]
    for variant in VARIANTS:
        runs, nats = _runs(results, variant), _nats(results, variant)
        tuned = [
            f"{row['rate']:g}: {_number(row['valid_nats'])}"
            for row in results["tuning"]
            if row["variant"] == variant
        ]
        logs = [run["certificates"]["log10"] for run in runs]
        certified = "none" if None in logs else f"10^{max(logs):.1f}"
        tokens = [run["certificates"].get("token") for run in runs]
        if None not in tokens:
            certified += f"; {max(tokens):.0f} in the token norm"
        rows.append(
            [
                variant,
                f"{runs[0]['parameters']:,}",
                ", ".join(tuned) or f"{runs[0]['rate']:g} (not tuned)",
                _spread(nats),
                _spread(nats / math.log(2.0)),
                certified,
            ]
        )
    header = ["attention", "weights", "learning rate: validation nats of the short run"]
    header += ["test nats per character", "test bits per character", "certified constant"]
    return header, rows


def _number(value):
    return "diverged" if value is None else f"{value:.3f}"


def _differences_table(results):
    pairs = (
        ("l2_untied", "dot_product"),
        ("l2", "dot_product"),
        ("l2, relative", "dot_product"),
        ("l2, relative", "dot_product, relative"),
        ("contractive, our bound", "l2"),
        ("contractive, our bound", "contractive, published bound"),
        ("contractive, bounded tokens", "contractive, our bound"),
        ("contractive, bounded tokens", "bounded tokens"),
        ("contractive, bounded tokens", "dot_product"),
        ("contractive, bounded tokens", "dot_product, relative"),
        ("contractive, certified", "contractive, bounded tokens"),
    )
    rows = []
    for one, other in pairs:
        ones, others = _nats(results, one), _nats(results, other)
        # Runs of one seed have seen the same characters.
        rows.append(
            [
                f"{one} - {other}",
                ", ".join(f"{value:+.4f}" for value in ones - others),
                _spread(ones - others),
                f"{100.0 * (ones.mean() / others.mean() - 1.0):+.2f} %",
            ]
        )
    return ["difference of test nats", "seed by seed", "mean +- deviation", "relative"], rows


def _bounds_table(results):
    rows = []
    for variant in (*TIED, *BOUNDED):
        name = variant + (", token norm" if variant == CERTIFIED else "")
        for index, layer in enumerate(_runs(results, variant)[0]["certificates"]["attention"]):
            ours, published = layer["ours"], layer["published"]
            others = ["none", "none"]
            if published is not None:
                others = [
                    f"{published[norm]:.4g} ({published[norm] / ours:.0f}x)"
                    for norm in ("l2", "linf")
                ]
            rows.append(
                [
                    f"{name}, layer {index}",
                    f"{ours:.4g}",
                    *others,
                    f"{layer['scale']:.2e}" if "scale" in layer else "1",
                    f"{layer['contraction']:.4f}" if "contraction" in layer else "",
                ]
            )
    header = ["attention after training, seed 0", "certified, 2-norm", "published, 2-norm"]
    header += ["published, max norm", "scale of the branch", "certified constant of the branch"]
    return header, rows


def _depths_table(results):
    rows = []
    for rate in results["setting"]["deep_rates"]:
        for variant in DEPTH_VARIANTS:
            found = {
                row["depth"]: row["nats"]
                for row in results["deep"]
                if row["variant"] == variant and row["rate"] == rate
            }
            depths = results["setting"]["depths"]
            rows.append([f"{variant}, rate {rate:g}", *(_number(found[d]) for d in depths)])
    header = ["training nats at the end"]
    return [*header, *(f"{depth} layers" for depth in results["setting"]["depths"])], rows


def _samples_table(results):
    rows = []
    for variant in TIED:
        runs = _runs(results, variant)
        text = runs[0]["sample"].replace("\n", "\\n").replace("|", "\\|").replace("`", "'")
        error = max(run["decoding_error"] for run in runs)
        rows.append([variant, f"`{text}`", f"{error:.1e}"])
    header = [
        "attention",
        f"a text, the first {PROMPT} characters given, temperature {TEMPERATURE}",
    ]
    return [*header, "logits of cached decoding against the full pass"], rows


def main(argv=None):
    options = report.arguments(__doc__, argv, corpus=corpora.NAMES)
    setting = FULL if options.full else SMALL
    name = options.corpus or ("ptb" if options.full else "pydoc")
    kept = Kept(options.folder / "char_lm.runs", [name, setting])
    report.produce("char_lm", options, lambda full: compute(name, setting, kept), draw)
    if not options.redraw:
        kept.path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
