"""How much each searched parameter matters, by Optuna's analysis of variance."""

from cadis_ray.search.objective import scores
from cadis_ray.search.trials import TrialResult
from cadis_ray.study.space import distributions
from cadis_ray.study.study import Study

LEAST = 4  # configurations: fewer say nothing


def importance(study: Study, trials: list[TrialResult]) -> dict[str, float]:
    """Share of the variance of the first metric that a parameter explains, the largest first; they sum to 1.

    fANOVA (Hutter, Hoos, Leyton-Brown, ICML 2014) on the complete searched trials, of parameters that all of them
    have. Empty where fewer than four trials are complete or nothing varies.
    """
    import optuna

    known = optuna.create_study(direction="maximize")
    complete = [trial for trial in trials if trial.candidate]
    for trial in complete:
        assert trial.estimate
        found, described = scores(study.objective, trial.estimate)[0], distributions(study.space, trial.parameters)
        known.add_trial(optuna.trial.create_trial(params=trial.parameters, distributions=described, value=found))
    if len(complete) < LEAST or len({trial.value for trial in known.trials}) < 2:
        return {}
    return optuna.importance.get_param_importances(
        known, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=study.seed)
    )
