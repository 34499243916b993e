"""Train one configuration or sweep over many: `python -m experiments.train --help`."""

import os
import sys

try:
    import hydra
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}; training needs the extra: pip install 'fff[train]'") from error

from . import config, sweep
from .run import job


def main() -> None:
    sweep.register()
    told_in_full = os.environ.get("HYDRA_FULL_ERROR")
    # Makes Hydra raise its errors instead of printing them over many lines.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        hydra.main(version_base="1.3", config_path=config.config_path(), config_name="config")(job)()
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on with what is not finished", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if told_in_full == "1":
            raise
        print(f"error: {config.explain(error)}", file=sys.stderr)
        sys.exit(2)
    finally:
        os.environ["HYDRA_FULL_ERROR"] = told_in_full or "0"


if __name__ == "__main__":
    main()
