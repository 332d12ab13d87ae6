"""The client library: a producer that retries, a consumer, and the wire they speak. Knows nothing of the broker's inside."""
