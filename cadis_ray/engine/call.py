"""A whole study as one call, for notebooks and programs: what ``python -m cadis_ray.tune`` does, without a command."""

from pathlib import Path

from cadis_ray.engine.run import attempt
from cadis_ray.errors import CadisError, TrialsFailed
from cadis_ray.interface.signals import interruption, signals_raise
from cadis_ray.results.report.notebook import Run, load
from cadis_ray.study.folder import check_place, default_folder, done, open_folder
from cadis_ray.study.load import load_study


def run_study(study_file: str | Path, *, out: str | Path | None = None, address: str = "local") -> Run:
    """Run a study to its end, or go on where an earlier call or command stopped; a run that is done is only loaded.

    Progress goes to stderr. Signals are handled as before when the call has ended: one that interrupts it, as Ctrl-C,
    is passed on then (KeyboardInterrupt), with everything counted saved. In another thread than the main one the call
    does not see signals.

    Args:
        study_file: The study, a YAML file as ``python -m cadis_ray.tune`` takes it.
        out: The run's folder. None: ``runs/NAME-HASH`` in the working directory; the same study finds its run again.
        address: HOST:PORT of a Ray cluster. "local" starts one on this machine and ends it afterwards, so Ray must not
            be connected in this process yet.

    Returns:
        The finished run, as ``cadis_ray.load`` gives it.

    Raises:
        UsageError: The study file or an argument is wrong, or ``out`` holds something else.
        EnvironmentProblem: Ray cannot be reached, or can never hold what the study asks for.
        DataError: Data or a checkpoint is refused.
        IntegrityError: Another driver holds the run, or what is stored contradicts itself.
        TrialsFailed: More trials failed than ``tolerated_failures``, or all; ``cadis_ray.load`` reads what there is.
        CadisError: Any other failure, with its cause. All of the above are CadisErrors.
    """
    check_place(out, address)
    study_file = Path(study_file)
    study = load_study(study_file)
    run_dir = default_folder(study) if out is None else Path(out)
    open_folder(study, study_file.read_text(), run_dir)
    if not done(run_dir):
        with signals_raise():
            ending = attempt(study, run_dir, address)
            if stopped := interruption(ending.error):
                raise stopped
        if isinstance(ending.error, CadisError):
            raise ending.error
        if ending.payload["status"] != "done":
            kind = CadisError if ending.error else TrialsFailed
            reason = ending.payload["reason"]
            raise kind(f"{reason}. Everything counted is saved in {run_dir}; the same call goes on") from ending.error
    return load(run_dir)
