"""Tests against real brokers and loaders, in processes of their own, that are killed and cut off."""
