"""The command line `s3lora`: one file for each command. Exit codes are part of the contract."""

import typer

from s3lora_serve.cli import (
    attest,
    audit,
    calibrate,
    doctor,
    evaluate,
    planner,
    policy,
    recheck,
    reference,
    report,
    scan,
    serve,
    statistics,
    strip,
    summary,
)

app = typer.Typer(
    no_args_is_help=True,
    help="The gate for LoRA adapters served by vLLM: score, strip, refuse.",
    pretty_exceptions_show_locals=False,
)
app.add_typer(policy.policy_app, name="policy")
app.add_typer(audit.audit_app, name="audit")
app.add_typer(reference.reference_app, name="reference")
app.add_typer(statistics.statistics_app, name="statistics")
app.command()(scan.scan)
app.command()(strip.strip)
app.command()(attest.attest)
app.command()(calibrate.calibrate)
app.command()(evaluate.evaluate)
app.command()(planner.planner)
app.command("report")(report.write_report)
app.command("summary")(summary.write_summary)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    serve.serve
)
app.command()(recheck.recheck)
app.command()(doctor.doctor)
