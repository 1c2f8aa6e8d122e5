"""The options of a training, a record for each panel of `--help`; `convcvx.training.options` puts them together."""
