"""The commit protocol as an executable model: explored exhaustively for small bounds, with each guard removed once.

`python -m tests.spec` explores every configuration. Start reading in `guards.py` (the rules, one flag each), then
`broker.py` (how a commit and an open are decided), `producer.py` and `consumer.py` (who takes part, and what may fail),
and `attempts.py` (inputs that kill, and who is blamed).
The model is written from the protocol, not from the product: it imports nothing of it.
"""
