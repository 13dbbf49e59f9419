"""What the server that tests of `serving` share was started with."""

KEY = "a secret"
PIN_BLOCKS = 20  # one prefix of 1,500 tokens and no more
