-- A target: what a login without superuser rights needs to apply changes as replication does.
-- :"login" is the role that runs the daemon, :"database" the database that it connects to.

-- No trigger, default or foreign-key action runs again.
GRANT SET ON PARAMETER session_replication_role TO :"login";

-- Temporary tables: rows that collide are moved aside in them.
GRANT TEMPORARY ON DATABASE :"database" TO :"login";

-- The origin marks what was applied, so that it does not travel back.
GRANT EXECUTE ON FUNCTION pg_catalog.pg_replication_origin_progress(text, boolean) TO :"login";
GRANT EXECUTE ON FUNCTION pg_catalog.pg_replication_origin_session_setup(text) TO :"login";
GRANT EXECUTE ON FUNCTION pg_catalog.pg_replication_origin_session_reset() TO :"login";
GRANT EXECUTE ON FUNCTION pg_catalog.pg_replication_origin_session_is_setup() TO :"login";
GRANT EXECUTE ON FUNCTION pg_catalog.pg_replication_origin_session_progress(boolean) TO :"login";
GRANT EXECUTE ON FUNCTION pg_catalog.pg_replication_origin_xact_setup(pg_lsn, timestamptz) TO :"login";
GRANT EXECUTE ON FUNCTION pg_catalog.pg_replication_origin_xact_reset() TO :"login";
