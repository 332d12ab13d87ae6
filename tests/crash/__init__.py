"""What a store may find after a crash: faults put under LMDB, and every state a power cut could leave."""
