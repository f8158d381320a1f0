-- A source: who its flows are (one row for each). Flows that share a topic have one slot and one identity.
--
-- A row without start_lsn is a deploy that did not finish: its slot, if there is one, was read by nobody, and the next
-- deploy makes it anew.

CREATE TABLE IF NOT EXISTS sitepair.flow (
    flow          text PRIMARY KEY,
    flow_id       uuid NOT NULL,
    pipeline      text NOT NULL,
    lane          text,
    from_site     text NOT NULL,
    to_site       text NOT NULL,
    start_lsn     pg_lsn,
    system_id     numeric(20) NOT NULL,
    timeline      bigint NOT NULL,
    slot          text NOT NULL,
    database      text NOT NULL,
    database_oid  oid NOT NULL,
    filters       jsonb NOT NULL DEFAULT '{}',
    entering      text[] NOT NULL DEFAULT '{}',
    entering_xmax xid8,
    created_at    timestamptz NOT NULL DEFAULT now()
);

ALTER TABLE sitepair.flow ADD COLUMN IF NOT EXISTS slot_dropped jsonb;
ALTER TABLE sitepair.flow DROP CONSTRAINT IF EXISTS flow_flow_id_key;

COMMENT ON TABLE sitepair.flow IS 'identity of each flow that starts here';
COMMENT ON COLUMN sitepair.flow.flow_id IS 'made at deploy; every record and checkpoint of the flow carries it';
COMMENT ON COLUMN sitepair.flow.start_lsn IS 'the slot''s consistent point, where the topic opens; null while a deploy is unfinished';
COMMENT ON COLUMN sitepair.flow.system_id IS 'system identifier of the cluster that made the slot';
COMMENT ON COLUMN sitepair.flow.filters IS 'row filter of each table that has one, as the last deploy found it: {"schema.table": "SQL"}';
COMMENT ON COLUMN sitepair.flow.entering IS 'tables that were added to the publication later and that the target has not taken up yet, to copy them';
COMMENT ON COLUMN sitepair.flow.entering_xmax IS 'a transaction id that was not in use yet once the publication had the last table that was added; null beside entering: not noted yet';
COMMENT ON COLUMN sitepair.flow.slot_dropped IS 'null, or: the daemon dropped the slot as the pipeline file asks for ([wal] on_limit), when, and what it held back';
