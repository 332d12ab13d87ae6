"""`idemq.testing`: a network that fails on purpose and a broker to kill, for the tests of applications."""

from idemq.client.link import Counts, Cut, Event, Faults, Link
from idemq.client.testing import BrokerFailed, BrokerProcess, broker

__all__ = ["BrokerFailed", "BrokerProcess", "Counts", "Cut", "Event", "Faults", "Link", "broker"]
