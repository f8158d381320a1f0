-- A target: what the login may do in the schema sitepair.  :"login" is the role that runs the daemon.

GRANT USAGE ON SCHEMA sitepair TO :"login";
GRANT SELECT ON ALL TABLES IN SCHEMA sitepair TO :"login";
GRANT INSERT, UPDATE, DELETE ON sitepair.checkpoint, sitepair.table_state, sitepair.copy_part, sitepair.copy_seen, sitepair.journal, sitepair.journal_operation, sitepair.journal_event, sitepair.parked, sitepair.displaced, sitepair.shadow, sitepair.request TO :"login";
GRANT USAGE ON ALL SEQUENCES IN SCHEMA sitepair TO :"login";
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA sitepair TO :"login";
