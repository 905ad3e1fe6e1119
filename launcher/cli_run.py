"""The verb `onetrain stop`."""

from onetrain.launcher.cli_arguments import AddressOption, ConfigArgument, SetOption, cluster_overrides
from onetrain.launcher.config import load_config
from onetrain.launcher.console import print_message
from onetrain.launcher.errors import ConfigError


def stop(config: ConfigArgument, overrides: SetOption = None, address: AddressOption = None) -> None:
    """Stop a run that goes on under supervision on a Ray cluster.

    It ends at once, and goes on from its newest checkpoint when it is started again.
    """
    options = load_config(config, [*(overrides or ()), *cluster_overrides(None, address)])
    from onetrain.launcher.supervised import has_address, stop_supervised

    if not has_address(options):
        raise ConfigError("a run on a local Ray is stopped by Ctrl-C; give --address for one on a cluster")
    if stop_supervised(options):
        print_message(f"{options.name} is being stopped")
    else:
        print_message(f"no run named {options.name} goes on under supervision on this cluster")
