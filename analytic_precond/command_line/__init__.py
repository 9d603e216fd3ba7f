"""The command line: `main` reads words, `commands` do the work, from `inputs` (files, functions) to `outputs`."""
