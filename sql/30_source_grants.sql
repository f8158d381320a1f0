-- A source: what the login may read in the schema sitepair.  :"login" is the role that runs the daemon.

GRANT USAGE ON SCHEMA sitepair TO :"login";
GRANT SELECT ON sitepair.installed, sitepair.flow TO :"login";

-- After a promotion the daemon notes the new timeline.
GRANT UPDATE (timeline) ON sitepair.flow TO :"login";
