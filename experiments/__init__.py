"""The commands: `python -m experiments.train`, in the wheel `fff-train`; the only code that knows Hydra."""
