"""`moe plan check` and `moe plan calibrate`: the planner against the article and against measurements.

As in main.py, commands import what they need when they run.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from moe.cli.plan_flags import MODEL, MaybeAmount, Model
from moe.cli.show import SHOW, Output, print_json, show_rows, show_sheet, write_csv


def check(
    claims: Positional[Path | None] = None,
    /,
    *,
    model: Model = MODEL,
    show: Output = SHOW,
) -> int:
    """A verdict for each figure of the article; exit status 1 where one is not as expected.

    Args:
        claims: A claims file. Default: the article's. Its expressions are run: check only files that you trust.
    """
    from moe.plan.claims import CLAIMS_FILE, check_claims, load_claims
    from moe.plan.quantities import explain

    verdicts = check_claims(load_claims(claims or CLAIMS_FILE), model)
    if show.explain is not None:
        from moe.errors import ConfigError

        found = next((v for v in verdicts if v.claim.id == show.explain), None)
        if found is None:
            raise ConfigError(f"explain = {show.explain!r}: there is no such claim; they are C01 to C102")
        c = found.claim
        print(f"{c.id} {c.text}\n{found.verdict}: {found.reason}\n{c.expr}")
        if found.computed is not None:
            print(explain(found.computed))
        return 0
    rows = [
        {"id": v.claim.id, "verdict": v.verdict, "claim": v.claim.text, "computed": v.reason, "expected": v.expected}
        for v in verdicts
    ]
    unexpected = [v for v in verdicts if not v.expected]
    if show.json:
        print_json({"claims": rows, "unexpected": [v.claim.id for v in unexpected]})
        write_csv(rows, show.csv)
    else:
        show_rows("the article, recomputed", rows, show)
        for v in unexpected:
            print(f"{v.claim.id}: expected {v.claim.verdict}, found {v.verdict}: {v.reason}")
        print(_summary(verdicts))
    return 1 if unexpected else 0


def report(path: Positional[Path], /, *, model: Model = MODEL) -> int:
    """Write one page, "the article, recomputed": every claim with its verdict, and pictures.

    Args:
        path: .html (holds its pictures) or .md (has them in a directory beside it).
    """
    from moe.plan.claims import check_claims
    from moe.plan.pictures import check_report, write_report

    check_report(path)
    write_report(check_claims(model=model), model, path)
    print(f"report: {path}")
    return 0


def calibrate(csv_file: Positional[Path], /, *, peak: MaybeAmount = None, show: Output = SHOW) -> int:
    """Efficiency constants from measured steps, and their error on steps that were held out.

    Args:
        csv_file: Rows with flop, bytes and seconds: plan.csv of moe train or moe profile step, or several joined.
        peak: Also as a share of this peak, such as "989 TFLOP/s".
    """
    from moe.plan.calibrate import calibrate, read_steps
    from moe.plan.quantities import Sheet, given, quantity

    steps = read_steps(csv_file)
    made = calibrate(steps)
    sheet = Sheet()
    sheet.put("calibrate.steps", len(steps), "x", "measured")
    sheet.put("calibrate.rate", quantity(made.rate, "FLOP/s"), "GFLOP/s", "infinite: compute does not limit")
    sheet.put("calibrate.bandwidth", quantity(made.bandwidth, "B/s"), "GB/s", "infinite: memory does not limit")
    sheet.put("calibrate.error", 100 * made.error(), "%", "of held-out steps, mean")
    sheet.put("calibrate.fitted_error", 100 * made.error(held_out=False), "%", "of the steps it was fitted on")
    if peak is not None:
        top = given(peak, "TFLOP/s", "peak")
        sheet.derive("calibrate.efficiency", "%", "rate / peak", rate=sheet["calibrate.rate"], peak=top)
    return show_sheet(f"{csv_file}", sheet, show)


def _summary(verdicts: Sequence[Any]) -> str:
    from collections import Counter

    counts = Counter(v.verdict for v in verdicts)
    external = counts.pop("EXTERNAL", 0)
    parts = ", ".join(f"{n} {name}" for name, n in counts.most_common())
    unexpected = sum(not v.expected for v in verdicts)
    return (
        f"{len(verdicts) - external} checkable of {len(verdicts)} claims ({external} are external facts): {parts}; "
        f"{unexpected or 'none'} unexpected"
    )
