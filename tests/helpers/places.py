"""Where things lie that tests read."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
STUDIES = ROOT / "search_spaces"
DIGITS = STUDIES / "digits.yaml"
GOLDEN = ROOT / "tests" / "golden"
OLD_RUNS = ROOT / "tests" / "old_runs"
SHARED = ROOT.parent / "shared"  # of a workplace; who has it not sees what needs it skipped
