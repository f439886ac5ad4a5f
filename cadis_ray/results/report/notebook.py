"""A run in a notebook: pandas frames, figures, and a page of its own."""

import html
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from cadis_ray.interface.text import one_line
from cadis_ray.results.read import read_result
from cadis_ray.results.records import certificate_records, trial_records
from cadis_ray.results.report.page import drawn_figures, summary
from cadis_ray.results.report.table import certificates_table, to_html, trials_table
from cadis_ray.results.study import StudyResult
from cadis_ray.storage.run_folder import RunFolder
from cadis_ray.study.study import Study, read_study


@dataclass(frozen=True)
class Run:
    """A run as it stood when it was loaded. ``result`` has everything; the frames are views of it."""

    study: Study
    result: StudyResult

    @property
    def trials(self) -> pd.DataFrame:
        """A line a trial or baseline, ranked: state, parameters by dotted path, and the search's ``estimate.`` columns.

        An estimate is no certificate.
        """
        return pd.json_normalize([
            {key: value for key, value in record.items() if key != "parameters"} | record["parameters"]
            for record in trial_records(self.result)
        ]).set_index("name")  # fmt: skip

    @property
    def epochs(self) -> pd.DataFrame:
        """A line an epoch of every trial: what it measured."""
        lines = [{"name": trial.name} | epoch for trial in self.result.trials for epoch in trial.epochs]
        return pd.DataFrame(lines, columns=None if lines else ["name", "epoch"]).set_index(["name", "epoch"])

    @property
    def models(self) -> pd.DataFrame:
        """A line a certified model: ACR, certified accuracy, abstentions, winner minus this one."""
        records = pd.json_normalize(certificate_records(self.result))
        return records if records.empty else records.set_index("name")

    @property
    def certificates(self) -> pd.DataFrame:
        """A line an image of every certified model; ``predict`` -1 abstains, ``radius`` is l2 on [0, 1] pixels."""
        columns = ("label", "predict", "radius", "correct", "p_a_lower", "seconds")
        parts = {
            name: pd.DataFrame({key: getattr(c, key) for key in columns}, index=pd.Index(c.idx, name="idx"))
            for name, c in self.result.certificates.items()
        }
        return pd.concat(parts, names=["name"]) if parts else pd.DataFrame(columns=[*columns])

    @property
    def figures(self) -> dict[str, Figure]:
        """The report's figures by name."""
        return drawn_figures(self.result)

    def _repr_html_(self) -> str:
        parts = [
            f"<h3>{html.escape(one_line(self.result.name))}</h3><p>{html.escape(one_line(summary(self.result)))}</p>"
        ]
        tables = [certificates_table(self.result)] if self.result.certificates else []
        for table in [*tables, trials_table(self.result)]:
            parts.append(f"<p><strong>{html.escape(table.title)}</strong></p>{to_html(table)}")
            parts += [f"<p><small>{html.escape(note)}</small></p>" for note in table.notes]
        return "\n".join(parts)


def load(run_dir: str | Path) -> Run:
    """Read the run in the folder ``run_dir``, finished or not: no Ray, no network.

    Raises UsageError where there is none, IntegrityError for a damaged one.
    """
    run_dir = Path(run_dir)
    study = read_study(run_dir)
    with RunFolder(run_dir).open_ledger() as ledger:
        return Run(study, read_result(study, run_dir, ledger))
