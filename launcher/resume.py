"""What checkpoint and configuration must have in common for a run to go on: the order of samples, and the network.

What else has changed is told.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from onetrain.data.cursor import Cursor
from onetrain.data.options import PathwayOptions
from onetrain.launcher.config import config_difference, load_config, save_config
from onetrain.launcher.console import print_warning
from onetrain.launcher.errors import ConfigError
from onetrain.launcher.options import RunConfig
from onetrain.model.options import ContrastiveOptions, KSAOptions, ModelOptions, MoEOptions, MTPOptions

MAY_CHANGE = {  # of the model: regularisation, initial values, weights and details of losses
    "preset",
    "preset_scale",
    "dropout",
    "context_dropout",
    "init_std",
    "decay",
    "weight",
    "temperature",
    "logq",
    "bias_rate",
    "sequence_loss",
    "z_loss",
}
SECTIONS: dict[str, MTPOptions | ContrastiveOptions | MoEOptions] = {
    "mtp": MTPOptions(),
    "contrastive": ContrastiveOptions(),
    "moe": MoEOptions(),
}
Json = dict[str, Any]


def read_cursor(saved: Any, checkpoint: Path) -> Cursor:
    """The cursor that a checkpoint holds. Raises ConfigError for one of an older version, a mere number."""
    if not isinstance(saved, dict):
        raise ConfigError(
            f"Checkpoint {checkpoint} was written by an older version, whose cursor cannot go on. Start another run "
            "(name) from its weights with train.warm_start."
        )
    return Cursor.from_json(saved)


def check_order(saved: Json, now: Json, checkpoint: Path) -> None:
    """Raises ConfigError if the checkpoint's cursor counts samples of another order."""
    now = _as_json(now)
    changed = [
        f"{key} was {saved.get(key)}, now {now.get(key)}" for key in {**now, **saved} if saved.get(key) != now.get(key)
    ]
    if changed:
        raise ConfigError(
            f"Checkpoint {checkpoint} cannot go on: its cursor has no meaning in another order of samples "
            f"({'; '.join(changed)}). Restore that, or start another run (name) from its weights with train.warm_start."
        )


def check_model(saved: Json, config: RunConfig, checkpoint: Path) -> None:
    """Raises ConfigError for another network, also where the shapes of its parameters do not show it.

    Args: `saved` is the configuration that the checkpoint holds.
    """
    before, after = _network(saved), _network(_as_json(asdict(config)))
    changed = [f"{key} was {before.get(key)}, now {after[key]}" for key in after if before.get(key) != after[key]]
    if changed:
        raise ConfigError(
            f"Checkpoint {checkpoint} cannot go on: it holds the weights of another network ({'; '.join(changed)}). "
            "Restore that, or start another run (name), from its weights with train.warm_start if they fit."
        )


def keep_config(config: RunConfig, run: Path, resumed: bool) -> None:
    """Write <run>/config.yaml; warns of what is other than before in a run that goes on."""
    path = run / "config.yaml"
    if resumed and path.exists():
        try:
            for key, old, new in config_difference(load_config(path), config):
                print_warning(f"resumed with {key} = {new}; it was {old}")
        except ConfigError as error:
            print_warning(f"cannot tell what changed since the run was started; an older version wrote {error}")
    save_config(config, path)


def _network(config: Json) -> Json:
    """The keys that the network's function depends on; the order of pathways counts."""
    model = _as_json(asdict(ModelOptions())) | config["model"]
    keys = {f"model.{key}": value for key, value in model.items() if key not in MAY_CHANGE}
    for name, defaults in SECTIONS.items():
        inner = _as_json(asdict(defaults)) | config["model"].get(name, {})  # an older version knew fewer keys
        keys[f"model.{name}"] = {key: value for key, value in inner.items() if key not in MAY_CHANGE}
    stack = _as_json(asdict(KSAOptions()))
    keys["model.ksa"] = {name: stack | ksa | {"kernel": None, "preset": None} for name, ksa in model["ksa"].items()}
    keys["conversion.stage"] = config.get("conversion", {}).get("stage", "none")
    pathways, known = config["batch"].get("pathways", {}), _as_json(asdict(PathwayOptions()))
    keys["batch.pathways"] = [[name, known | pathway] for name, pathway in pathways.items()]
    return keys


def _as_json(value: Json) -> Json:
    """As a checkpoint holds it: lists for tuples."""
    return json.loads(json.dumps(value))
