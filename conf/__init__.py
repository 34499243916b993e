"""Configuration files of the experiments; a package so that `pkg://fff.conf` finds them."""
