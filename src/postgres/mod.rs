//! F2: talking to PostgreSQL: sessions, TLS, the replication stream, catalog, slot, publication, origin.
