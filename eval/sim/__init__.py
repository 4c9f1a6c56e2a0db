"""The simulator: the router agents of the live system in virtual time, around the engine model of the emulator."""
