//! F2: the durable topic and its backends.
