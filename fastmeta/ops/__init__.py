"""The ops: signature, docstring, checks and autograd, once each; workers compute."""
