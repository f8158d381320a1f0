-- A source: what the login may read in the schema sitepair.  :"login" is the role that runs the daemon.

GRANT USAGE ON SCHEMA sitepair TO :"login";
GRANT SELECT ON sitepair.installed, sitepair.flow TO :"login";

-- After a promotion the daemon notes the new timeline; once it copies tables that were added, it says so; and so it does
-- where the pipeline file lets it drop the slot.
GRANT UPDATE (timeline, entering, entering_xmax, slot_dropped) ON sitepair.flow TO :"login";

-- Where copies travel through the topic, the reader's node notes how far they are.
GRANT SELECT, INSERT, UPDATE, DELETE ON sitepair.topic_copy TO :"login";
