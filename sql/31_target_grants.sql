-- A target: what the login may do in the schema sitepair.  :"login" is the role that runs the daemon.

GRANT USAGE ON SCHEMA sitepair TO :"login";
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA sitepair TO :"login";
GRANT USAGE ON ALL SEQUENCES IN SCHEMA sitepair TO :"login";
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA sitepair TO :"login";
