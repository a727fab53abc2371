"""A recommendation for a terminal: what was asked, the options as a table, what was rejected and why."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from jquant.hardware.expected_loss import SOURCE
from jquant.hardware.recommend import FLOAT, Option, Recommendation


def render(found: Recommendation) -> RenderableType:
    """The recommendation, best option first."""
    asked = found.constraints
    load, device = asked.load, asked.device
    goal = "latency: least seconds a request" if asked.first == "latency" else "throughput: most tokens a second"
    assert asked.usable is not None
    heading = (
        f"{asked.shape.name}, {asked.shape.parameters / 1e9:.3g} billion parameters, on {asked.devices} × "
        f"{device.name} ({asked.usable / 1e9:.3g} GB usable each); batch {load.batch}, {load.prompt:,} prompt tokens, "
        f"{load.output:,} new ones; loss up to {asked.max_loss_percent:g} %; {goal}"
    )
    parts: list[RenderableType] = [Text(heading), Text()]
    if found.options:
        parts += [_options(found), Text(), *_best(found)]
    else:
        parts.append(Text("Nothing fits and keeps the loss: see why below.", style="bold"))
        possible = [each for each in found.rejections if each.devices_needed is not None]
        if possible:
            least = min(possible, key=lambda each: each.devices_needed or 0)
            parts.append(_indented(f"{least.devices_needed} × {device.name} would hold {least.candidate}."))
    if found.rejections:
        parts += [Text(), Text("Rejected", style="bold"), _rejections(found)]
    parts += [Text(), Text("To know", style="bold"), *(_indented(caveat) for caveat in found.caveats)]
    return Group(*parts)


def _options(found: Recommendation) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    throughput = found.constraints.first == "throughput"
    titles = ["scheme and method", "bits", "GB/device"]
    titles += ["batch"] if throughput else []
    titles += ["prefill", "ms/token", "tokens/s", "loss %", "in"]
    for title in titles:
        words = title == "scheme and method"  # may be folded; a number that is cut in two reads as another
        table.add_column(
            title, justify="left" if words or title == "in" else "right", no_wrap=not words, overflow="fold"
        )
    for option in found.options:
        row = [str(option.candidate), f"{option.bits_per_weight:.3g}", _gigabytes(option.memory.total)]
        row += [str(option.batch)] if throughput else []
        row += ["?" if option.prefill is None else _seconds(option.prefill.total), f"{1e3 * option.decode.total:.3g}"]
        row += [f"{option.tokens_per_second:,.3g}" if option.tokens_per_second < 1000 else _thousands(option)]
        row += [f"{option.loss.percent:+.2f}" if option.candidate.scheme != FLOAT else "0", option.multiplied_in]
        table.add_row(*row)
    return table


def _best(found: Recommendation) -> list[RenderableType]:
    best = found.options[0]
    lines: list[RenderableType] = [Text(f"Take {best.candidate}.", style="bold")]
    why = [
        f"decoding is bound by {_bound(best.decode.bound)}"
        + (f", prefill by {_bound(best.prefill.bound)}" if best.prefill is not None else ""),
        *best.notes,
        f"expected loss: {best.loss.source}",
    ]
    lines.extend(_indented(f"{reason[0].upper()}{reason[1:]}.") for reason in why)
    if best.candidate.scheme != FLOAT:
        options = f"--scheme {best.candidate.scheme} --method {best.candidate.method}"
        lines.append(_indented(f"jquant quantize MODEL {options} --out OUT, then jquant eval OUT --reference MODEL"))
    return lines


def _rejections(found: Recommendation) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for rejection in found.rejections:
        reasons = "; ".join(reason.replace(f" ({SOURCE})", "") for reason in rejection.reasons)
        table.add_row(str(rejection.candidate), Text(reasons))
    return table


def _indented(line: str) -> Padding:
    return Padding(Text(line), (0, 0, 0, 2))


def _bound(bound: str) -> str:
    return {"rate": "multiplication", "unknown rate": "bandwidth, as far as is known"}.get(bound, bound)


def _seconds(value: float) -> str:
    return f"{1e3 * value:.3g} ms" if value < 1 else f"{value:.3g} s"


def _gigabytes(value: float) -> str:
    return f"{value / 1e9:.1f}" if value >= 1e10 else f"{value / 1e9:.2f}"


def _thousands(option: Option) -> str:
    return f"{float(f'{option.tokens_per_second:.3g}'):,.0f}"
