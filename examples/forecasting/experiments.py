"""The runs of the experiments: what each is, and how one is trained and tested."""

import tempfile
import time
from dataclasses import asdict, dataclass

import torch
from torch.utils.data import Subset
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from hf_variational import VariationalTrainingArguments

from .configuration import AGGREGATIONS, EVEForecasterConfig, linear_eve
from .data import SOURCES, Windows
from .dlinear import DLinear
from .metrics import SCORES
from .modeling import EVEForecaster
from .trainer import ForecastTrainer

MODELS = ("dlinear", "twin", "eve")
REGIMES = ("off", "projection", "homeostasis")
TEST_SAMPLES = 32
# The band of the mean energy E[mu^2] that the regimes steer by: factors of its target.
LOW, HIGH = 0.5, 2.0
# Edges of the histograms of mean energy: quarter octaves, so that every band that is used ends on an edge.
OCTAVES = torch.arange(-20.0, 12.25, 0.25)
PROBES = 20
# What the means of the bank start multiplied with: collapsed, as they are, exploding.
STARTS = (1.0 / 32.0, 1.0, 8.0)
# Targets of the band from far below to far above where the units go by themselves.
TARGETS = (2.0**-6, 2.0**-2, 2.0**2)
# k = 16 costs sixteen times the bank, so these runs are the shortest.
WIDTHS = (1, 2, 4, 8, 16)
# Optimizer steps and learning rates: what there was to choose from, and what was best over the three sets (the mean of
# the logarithms of the errors on the validation part, first seed; see `tuning`). EVE has what its twin has.
LENGTHS, RATES = (150, 600), (3e-4, 1e-3, 2e-3, 5e-3)
TWIN_CHOICES = ((150, 1e-3), (600, 3e-4), (600, 1e-3))
TUNED = {"dlinear": (600, 2e-3), "twin": (600, 3e-4)}
KEPT = (*SCORES, "kl", "loss", "num_values")
LOGGED = ("step", "nll", "kl", "posterior_scale", "mean_energy", "active_fraction")


@dataclass(frozen=True)
class Run:
    """One training and its test; everything that makes it differ from another.

    Attributes:
        dataset: a name of `data.SOURCES`.
        model: one of `MODELS`.
        objective: of an [`EVEForecaster`]; `"mse"` for DLinear.
        seed: of weights, noise and order of the data.
        latent_dim: k.
        aggregation: how samples become a forecast.
        prior: `"standard"`, `"autoregressive"` (fixed phi 0.9), or `"learned"` (autoregressive, phi learned).
        regime: one of `REGIMES`.
        target: of the band.
        start: the bank's means start multiplied with this.
        steps: optimizer steps.
        learning_rate: the highest of the cosine schedule.
        stride: of the test; `None`: the data set's.
    """

    dataset: str
    model: str = "eve"
    objective: str = "mc_nll"
    seed: int = 0
    latent_dim: int = 1
    aggregation: str = "mean"
    prior: str = "standard"
    regime: str = "off"
    target: float = 0.25
    start: float = 1.0
    steps: int = 150
    learning_rate: float = 1e-3
    stride: int | None = None

    @property
    def key(self) -> str:
        """What the results file calls it."""
        return " ".join(f"{name}={value}" for name, value in asdict(self).items())

    @property
    def train_samples(self) -> int:
        """The mixture of one sample is that sample; the other objectives have nothing to gain from several."""
        several = self.objective == "mc_nll" or self.aggregation != "mean"
        return 2 if several else 1


class EnergyProbe(TrainerCallback):
    """Counts now and then how many units have which mean energy E[mu^2], over the same training windows each time."""

    def __init__(self, past: torch.Tensor, steps: int):
        self.past = past
        self.every = max(1, steps // PROBES)
        self.history: list[dict] = []

    @torch.no_grad()
    def _look(self, step: int, model: EVEForecaster) -> None:
        model.eval()
        outputs = model(self.past.to(model.device), num_posterior_samples=0, output_posteriors=True)
        energy = outputs.posteriors[0].mean_energy.cpu()
        edges = torch.cat([torch.tensor([-torch.inf]), OCTAVES, torch.tensor([torch.inf])])
        counts = torch.histogram(energy.log2().clamp(min=-1e3), bins=edges).hist
        self.history.append({"step": step, "mean": float(energy.mean()), "counts": counts.int().tolist()})

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._look(0, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0:
            self._look(state.global_step, model)
            model.train()


def control_of(run: Run) -> dict:
    """The `regime` of the training arguments of a run that is steered: the control's defaults, but for its intervals.

    The runs are short: every other step is measured, and a projection comes every ten.
    """
    control = {"band": {"target": run.target, "low_factor": LOW, "high_factor": HIGH}, "interval": 2}
    if run.regime == "projection":
        return {**control, "projection": {"interval": 10}}
    return {**control, "homeostasis": {}}


def build(run: Run, **options):
    """The model of a run, with fresh weights of its seed; `options` are further fields of its configuration."""
    set_seed(run.seed)
    prior = {"prior": "standard" if run.prior == "standard" else "autoregressive"}
    if run.prior == "learned":
        prior["learn_autoregressive_coefficient"] = True
    config = EVEForecasterConfig(
        eve=linear_eve(latent_dim=run.latent_dim, **prior),
        deterministic=run.model == "twin",
        objective=run.objective,
        aggregation=run.aggregation,
        **options,
    )
    if run.model == "dlinear":
        return DLinear(config.lookback, config.horizon, config.moving_average)
    model = EVEForecaster(config)
    with torch.no_grad():
        model.bank.mean_weight.mul_(run.start)
    return model


def execute(run: Run, parts: dict[str, Windows], **model_options) -> dict:
    """Trains and tests one run.

    Returns:
        `run`; `test`, the scores over `TEST_SAMPLES` posterior samples; `mean_pass`, those of the mean pass;
        `validation`, those on the validation part where there are no samples; `log`; `energy`, the probe's history;
        `cpu_seconds` of training and of the test.
    """
    model = build(run, **model_options)
    is_eve = run.model == "eve"
    with tempfile.TemporaryDirectory() as folder:
        args = VariationalTrainingArguments(
            folder,
            max_steps=run.steps,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=64,
            learning_rate=run.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=10,
            logging_steps=max(1, run.steps // PROBES),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=run.seed,
            train_posterior_samples=run.train_samples if is_eve else None,
            eval_posterior_samples=TEST_SAMPLES,
            **({} if run.regime == "off" else {"regime": control_of(run)}),
        )
        trainer = ForecastTrainer(model, args, train_dataset=parts["train"])
        trainer.remove_callback(PrinterCallback)
        probe = None
        if is_eve:
            generator = torch.Generator().manual_seed(0)
            chosen = torch.randperm(len(parts["train"]), generator=generator)[:64].tolist()
            some = Subset(parts["train"], chosen)
            probe = EnergyProbe(torch.stack([item["past"] for item in some]), run.steps)
            trainer.add_callback(probe)
        begin = time.process_time()
        trainer.train()
        trained = time.process_time()
        scores = trainer.evaluate(parts["test"])
        tested = time.process_time()
        validation = {} if is_eve else trainer.evaluate(parts["validation"])
    log = [{name: entry[name] for name in LOGGED if name in entry} for entry in trainer.state.log_history]
    return {
        "run": asdict(run),
        "test": _scores(scores, "eval_", "eval_mean_pass_"),
        "mean_pass": _scores(scores, "eval_mean_pass_"),
        "validation": _scores(validation, "eval_", "eval_mean_pass_"),
        "log": [entry for entry in log if "nll" in entry],
        "energy": [] if probe is None else probe.history,
        "cpu_seconds": {"training": trained - begin, "test": tested - trained},
    }


def _scores(scores: dict, prefix: str, but: str | None = None) -> dict[str, float]:
    names = [name for name in scores if name.startswith(prefix) and not (but and name.startswith(but))]
    return {name.removeprefix(prefix): scores[name] for name in names if name.removeprefix(prefix) in KEPT}


def compared(dataset: str, model: str, objective: str, seed: int = 0, stride: int | None = None) -> Run:
    """A run of the comparison of models, with the steps and the learning rate that tuning found for its kind."""
    steps, rate = TUNED["dlinear" if model == "dlinear" else "twin"]
    return Run(dataset, model, objective, seed, steps=steps, learning_rate=rate, stride=stride)


def tuning(dataset: str) -> list[Run]:
    """What the steps and the learning rate are chosen from, by the error on the validation part."""
    return [
        *(Run(dataset, "dlinear", "mse", steps=n, learning_rate=rate) for n in LENGTHS for rate in RATES),
        *(Run(dataset, "twin", "nll", steps=n, learning_rate=rate) for n, rate in TWIN_CHOICES),
    ]


def groups(seeds: int = 3) -> dict[str, list[Run]]:
    """The runs of each experiment, in the order in which they are worth their time."""
    pairs = (("dlinear", "mse"), ("twin", "mse"), ("eve", "mse"), ("twin", "nll"), ("eve", "nll"), ("eve", "mc_nll"))
    each_seed = range(seeds)
    # Sweeps on one data set, with fewer steps.
    small = {"dataset": "ETTh1", "steps": 100}
    short = {"dataset": "ETTh1", "steps": 50, "stride": 24}
    steered = REGIMES[1:]
    return {
        "tuning": [run for d in SOURCES for run in tuning(d)],
        "main": [compared(d, m, o, s) for s in each_seed for d in SOURCES for m, o in pairs],
        "every origin": [compared(d, "dlinear", "mse", stride=1) for d in SOURCES],
        "regimes": [
            Run(d, objective=o, seed=s, regime=r)
            for s in each_seed
            for d in SOURCES
            for o in ("mc_nll", "nll")
            for r in REGIMES
        ],
        "prior": [
            *(Run(d, seed=s, prior="autoregressive") for s in each_seed for d in SOURCES),
            *(Run("ETTh1", seed=s, prior="learned") for s in each_seed),
        ],
        "width": [Run(**short, seed=s, latent_dim=k) for s in each_seed for k in WIDTHS],
        "start": [
            Run(**small, objective="nll", seed=s, start=m, regime=r)
            for s in each_seed
            for m in STARTS
            for r in REGIMES
        ],
        "band": [
            Run(**small, objective="nll", seed=s, target=t, regime=r)
            for s in each_seed
            for t in TARGETS
            for r in steered
        ],
        "aggregation": [Run(**small, objective="mse", seed=s, aggregation=a) for s in each_seed for a in AGGREGATIONS],
    }
