"""Bad input of all kinds, as tables of (name, input, sentence): one sentence each, exit code 2, and nothing written."""
