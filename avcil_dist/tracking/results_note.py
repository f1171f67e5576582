"""Description of a stream's run in MLflow: its results so far, as a Markdown table."""

from avcil_dist.streams.metrics import StreamMetrics

MAX_STEPS = 20  # rows of the table; the last ones


def results_note(metrics: StreamMetrics) -> str:
    """Return the results up to the last step: seen accuracy, forgetting and selected epoch, a row for each step."""
    lines = [
        f"Mean accuracy **{metrics.mean_accuracy:.1%}** over {metrics.step + 1} steps"
        + (f", average forgetting **{metrics.average_forgetting:.1%}**." if metrics.forgetting else "."),
        "",
        "| step | seen accuracy | forgetting | selected epoch |",
        "|---:|---:|---:|---:|",
    ]
    choices = metrics.choices or (None,) * (metrics.step + 1)
    for step in range(max(0, metrics.step + 1 - MAX_STEPS), metrics.step + 1):
        forgotten = f"{metrics.forgetting[step - 1]:.1%}" if step else "–"
        lines.append(f"| {step} | {metrics.seen_accuracy[step]:.1%} | {forgotten} | {choices[step] or '–'} |")
    if any(choice and choice.num_ties for choice in choices):
        lines += ["", "\\* later epochs are as good on the validation clips; the first of them is kept."]
    lines += ["", "`avcil resume` with the name of this run continues it; `avcil report` shows it beside others."]
    return "\n".join(lines)
