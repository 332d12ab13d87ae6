"""`idemq.testing`: a network that fails on purpose and a broker to kill, for the tests of applications."""

from idemq.client.testing import BrokerFailed, BrokerProcess, Counts, Cut, Event, Faults, Link, broker

__all__ = ["BrokerFailed", "BrokerProcess", "Counts", "Cut", "Event", "Faults", "Link", "broker"]
