"""Train one configuration or sweep over many: `python -m experiments.train --help`."""

import sys

try:
    import hydra
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}; training needs the extra: pip install 'fff[train]'") from error

from . import config, sweep
from .run import job


def main() -> None:
    sweep.register()
    try:
        with config.one_line_errors(config.Config, config.Trainer):
            hydra.main(version_base="1.3", config_path=config.config_path(), config_name="config")(job)()
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on with what is not finished", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
