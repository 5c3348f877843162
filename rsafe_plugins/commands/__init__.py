"""The subcommands of `rsafe`, one module each; `rsafe_plugins.cli` puts them together."""
