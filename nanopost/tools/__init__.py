"""The tools around training: `nanopost` lists them, `nanopost chat out/ppo` runs one (nanopost/__main__.py)."""
