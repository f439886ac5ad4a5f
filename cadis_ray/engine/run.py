"""One run of a study in its folder: start or resume, and leave a record of how it ended, whatever happened."""

import shlex
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from cadis_ray.engine.study import finish_study
from cadis_ray.errors import CadisError, ExitCode
from cadis_ray.interface.progress import Progress
from cadis_ray.interface.signals import Interrupted, interruption, raise_on_signals
from cadis_ray.results.mlflow import store
from cadis_ray.results.mlflow.outbox import Outbox
from cadis_ray.results.records import finalists, records, write_result
from cadis_ray.results.report.page import write_report
from cadis_ray.results.report.search_section import finalists_table
from cadis_ray.results.report.table import certificates_table, to_rich, to_text, trials_table
from cadis_ray.results.study import StudyResult
from cadis_ray.storage.ledger import Ledger
from cadis_ray.storage.lock import RunLock
from cadis_ray.storage.run_folder import RunFolder
from cadis_ray.study.study import Study

TRACKING_SECONDS = 60.0
INTERRUPTED_TRACKING_SECONDS = 2.0


@dataclass(frozen=True)
class Ending:
    """How a run ended: the content of result.json; what came out, if all was done; what stopped it, if not."""

    payload: dict[str, Any]
    result: StudyResult | None
    error: BaseException | None


def run(study: Study, run_dir: Path, address: str) -> ExitCode:
    """Run or resume the study as a command: prints the tables, or what stopped it. Returns how it ended."""
    raise_on_signals()
    ending = attempt(study, run_dir, address)
    payload = ending.payload
    if payload["exit_code"] == ExitCode.INTERNAL and not isinstance(ending.error, CadisError):
        traceback.print_exception(ending.error)
    if ending.result is not None:
        uri = store.address(study, run_dir.resolve())
        show(ending.result, store.without_secrets(uri, uri))
    if payload["status"] != "done":
        said = f"{payload['status']}: {payload['reason']}\nEverything counted is saved. Go on with:\n  "
        print(said + payload["resume_command"], file=sys.stderr)
    return ExitCode(payload["exit_code"])


def attempt(study: Study, run_dir: Path, address: str) -> Ending:
    """Run or resume the study and leave result.json, whatever happens; prints no more than its progress.

    What ends the study early is in the Ending. Raises what keeps it from beginning: IntegrityError where another driver
    holds the run or the ledger is damaged, EnvironmentProblem where the run cannot be locked.
    """
    run_dir = run_dir.resolve()
    resume = f"python -m cadis_ray.tune --resume {shlex.quote(str(run_dir))}"
    payload: dict[str, Any] = {"status": "failed", "exit_code": 1, "reason": None, "resume_command": resume}
    result: StudyResult | None = None
    problem: BaseException | None = None
    status, patience = "FAILED", INTERRUPTED_TRACKING_SECONDS
    with RunLock(RunFolder(run_dir).lock), Ledger(RunFolder(run_dir).ledger) as ledger, Progress() as progress:
        outbox = Outbox(ledger.path, study, run_dir, progress.note)
        try:
            result = finish_study(study, run_dir, ledger, address, progress)
            write_report(result)
            payload |= verdict(study, result) | records(result)
            status, patience = "FINISHED", TRACKING_SECONDS
        except (Exception, Interrupted) as error:
            problem = error
            if isinstance(error, CadisError):
                payload |= {"exit_code": int(error.exit_code), "reason": str(error)}
            elif signal := interruption(error):
                payload |= {"status": "interrupted", "exit_code": signal.exit_code, "reason": str(signal)}
                status = "KILLED"
            else:
                payload |= {"reason": f"internal error, {type(error).__name__}: {error}"}
        finally:
            write_result(run_dir, payload)
            outbox.close(result, status, patience)
    return Ending(payload, result, problem)


def verdict(study: Study, result: StudyResult) -> dict[str, Any]:
    """Done, or failed for want of a winner, or because more trials failed than ``tolerated_failures``."""
    failed = [trial.name for trial in result.trials if trial.state == "failed"]
    reason = f"{len(failed)} trials failed ({', '.join(failed)})" if failed else None
    if result.winner is None:
        reason = "no trial was completed, so there is no winner"
    elif len(failed) <= study.tolerated_failures:
        return {"status": "done", "exit_code": int(ExitCode.DONE), "reason": reason}
    return {"status": "failed", "exit_code": int(ExitCode.TRIALS_FAILED), "reason": reason}


def show(result: StudyResult, mlflow: str) -> None:
    """The tables, and where everything is: rich on a terminal, plain lines elsewhere. ``mlflow``: its address."""
    tables = [trials_table(result)] + ([finalists_table(result)] if finalists(result) else [])
    tables += [certificates_table(result)] if result.certificates else []
    console = Console()
    for table in tables:
        if console.is_terminal:
            console.print(to_rich(table, console.width))
        else:
            print("\n".join(to_text(table)))
    folder = RunFolder(result.run_dir)
    for what, path in (("report", folder.report_html), ("certificates", folder.winner), ("result", folder.result)):
        if path == folder.result or path.exists():
            print(f"{what}: {path}")
    served = mlflow if mlflow.startswith("http") else f"mlflow ui --backend-store-uri {shlex.quote(mlflow)}"
    print(f"all trials in MLflow: {served}", flush=True)
