-- What the applier keeps at the target: its checkpoint, the journal of what it applied, and what it set aside.
-- Repeatable: every object is created only if it is missing, functions are replaced.

create schema if not exists sitepair;

create table if not exists sitepair.checkpoint (
    flow text not null,
    track text not null default 'main' check (track in ('main', 'joining', 'replay')),
    flow_id uuid not null,
    next_offset bigint not null check (next_offset >= 0),
    end_lsn pg_lsn not null,
    commit_time timestamptz,
    horizon pg_lsn not null,
    pipeline text not null,
    source_site text not null,
    target_site text not null,
    system_id numeric(20) not null,
    timeline bigint not null,
    slot text not null,
    source_database text not null,
    source_database_oid oid not null,
    updated_at timestamptz not null default clock_timestamp(),
    primary key (flow, track)
);
comment on table sitepair.checkpoint is
    'How far each flow is applied here. Moves in the same transaction as the changes, only by sitepair.advance.';
comment on column sitepair.checkpoint.track is
    'main: the flow; joining: tables that were copied or paused and catch up with it; replay: a range applied again';
comment on column sitepair.checkpoint.next_offset is 'offset in the topic of the next record to apply';
comment on column sitepair.checkpoint.end_lsn is 'position in the source''s log that everything up to is applied';
comment on column sitepair.checkpoint.commit_time is 'source commit time of the last transaction applied';
comment on column sitepair.checkpoint.horizon is
    'while end_lsn is below it, rows here may be newer than end_lsn; consistent from it on';

create table if not exists sitepair.table_state (
    flow text not null,
    table_schema text not null,
    table_name text not null,
    state text not null check (state in ('copying', 'copied', 'paused', 'joining', 'joined')),
    next_offset bigint,
    end_lsn pg_lsn,
    horizon pg_lsn,
    reason text,
    fingerprint text,
    held_rows boolean,
    snapshot_rows bigint,
    replayed_to pg_lsn,
    copied_from bigint,
    since timestamptz not null default clock_timestamp(),
    primary key (flow, table_schema, table_name)
);
comment on table sitepair.table_state is
    'One row for each table of a flow. The main track applies the changes of joined tables only; those of the others wait in '
    'the topic, from next_offset on.';
comment on column sitepair.table_state.state is
    'copying: chunks are under way; copied: the last chunk is committed; paused: the table here does not fit its changes; '
    'joining: the joining track applies what waited; joined: at the flow''s checkpoint';
comment on column sitepair.table_state.next_offset is 'offset of the first record whose changes of this table are not applied; null when joined';
comment on column sitepair.table_state.end_lsn is 'position of the flow before that record';
comment on column sitepair.table_state.horizon is 'position of the source that no row of the copy is newer than';
comment on column sitepair.table_state.reason is 'paused, or copying: what does not fit, and what to run';
comment on column sitepair.table_state.fingerprint is 'where there is a reason: the table''s columns and keys here when it was found not to fit';
comment on column sitepair.table_state.held_rows is 'copying: the table held rows before the first chunk, so rows that the source lacks must go';
comment on column sitepair.table_state.snapshot_rows is 'copying: the source''s own estimate of its rows when the copy began';

alter table sitepair.table_state add column if not exists copied_from bigint;
comment on column sitepair.table_state.copied_from is
    'offset at which its last copy began: what the topic holds of the table before it is never applied again, since the copy '
    'may know what no record says (a table made anew, a partition detached)';
comment on column sitepair.table_state.replayed_to is
    'after a rewind: every row of the table that no record has touched since is as of this position; null where the table is '
    'exactly at its checkpoint';

create table if not exists sitepair.copy_part (
    flow text not null,
    table_schema text not null,
    table_name text not null,
    part integer not null,
    low jsonb,
    high jsonb,
    cursor jsonb,
    rows bigint not null default 0,
    bytes bigint not null default 0,
    ended boolean not null default false,
    updated_at timestamptz not null default clock_timestamp(),
    primary key (flow, table_schema, table_name, part)
);
comment on table sitepair.copy_part is
    'How far the copy of a table is, by ranges of its key; moves in the transaction of the chunk. Gone when the table is copied.';
comment on column sitepair.copy_part.part is 'a range of the key at the source; -1 is the sweep for rows that the source lacks';
comment on column sitepair.copy_part.low is 'the range begins after this key; null: at the first';
comment on column sitepair.copy_part.high is 'the range ends with this key; null: with the last';
comment on column sitepair.copy_part.cursor is 'key of the last row of the last chunk; null before the first chunk';

create table if not exists sitepair.copy_seen (
    flow text not null,
    table_schema text not null,
    table_name text not null,
    key bytea not null,
    primary key (flow, table_schema, table_name, key)
);
comment on table sitepair.copy_seen is
    'Where a copy travels through the topic into a table that held rows: digests of the keys that came. When the last chunk is '
    'in, rows with other keys go, and these digests.';

create table if not exists sitepair.journal (
    id bigint generated always as identity primary key,
    flow text not null,
    track text not null default 'main',
    first_offset bigint not null,
    last_offset bigint not null,
    first_lsn pg_lsn not null,
    end_lsn pg_lsn not null,
    commit_time timestamptz,
    transactions integer not null,
    rows bigint not null,
    counts jsonb not null,
    status text not null check (status in ('adopted', 'applied', 'parked', 'progress', 'moved')),
    duration_ms numeric(12, 3) not null,
    applied_at timestamptz not null default clock_timestamp()
);
create index if not exists journal_flow_offset on sitepair.journal (flow, first_offset);
comment on table sitepair.journal is
    'One row for each group of source transactions, committed with the group. Offsets of one track join without a gap: a row '
    'begins where the one before it ended.';
comment on column sitepair.journal.first_lsn is 'position before the group';
comment on column sitepair.journal.counts is
    'operations by table: {"schema.table": {"insert": n, "update": n, "delete": n, "truncate": n, "parked": n, ...}}';
comment on column sitepair.journal.status is
    'applied; parked: applied but for the operations in journal_operation; progress: nothing for the tables here; moved: the '
    'checkpoint was set by hand (journal_event says why), last_offset + 1 is where it went on';

create table if not exists sitepair.journal_operation (
    id bigint generated always as identity primary key,
    flow text not null,
    next_offset bigint not null,
    table_schema text not null,
    table_name text not null,
    what text not null check (what in ('parked', 'displaced', 'restored', 'settled', 'fetched', 'skipped')),
    key jsonb,
    sqlstate text,
    reason text not null,
    noted_at timestamptz not null default clock_timestamp()
);
create index if not exists journal_operation_flow_offset on sitepair.journal_operation (flow, next_offset);
comment on table sitepair.journal_operation is
    'One row for each operation that was not simply applied; next_offset is the journal row''s last_offset + 1.';

create table if not exists sitepair.journal_event (
    id bigint generated always as identity primary key,
    flow text not null,
    what text not null,
    table_schema text,
    table_name text,
    detail jsonb not null default '{}',
    reason text,
    requested_by text not null default session_user,
    noted_at timestamptz not null default clock_timestamp()
);
create index if not exists journal_event_flow on sitepair.journal_event (flow, id);
comment on table sitepair.journal_event is
    'What happened beside the groups: copies, pauses, resets, replays, what operators did and why.';

create table if not exists sitepair.parked (
    id bigint generated always as identity primary key,
    flow text not null,
    next_offset bigint not null,
    end_lsn pg_lsn not null,
    commit_time timestamptz,
    table_schema text not null,
    table_name text not null,
    operation text not null check (operation in ('upsert', 'update', 'delete', 'restore')),
    key_columns text[] not null default '{}',
    row_filter text,
    key jsonb not null,
    old_key jsonb,
    image jsonb,
    held jsonb not null default '[]',
    whole_row text,
    sqlstate text,
    error text not null,
    parked_at timestamptz not null default clock_timestamp()
);
create index if not exists parked_flow on sitepair.parked (flow, table_schema, table_name);
comment on table sitepair.parked is
    'Operations that could not be applied under on_error = "park", with their full image. Later changes of the same key or '
    'of the unique values in "held" are parked too.';
comment on column sitepair.parked.image is 'the row to write, column by column in text form; columns not in it keep their value';
comment on column sitepair.parked.key_columns is 'names of the columns of key and old_key, in their order';
comment on column sitepair.parked.row_filter is 'the rule''s row filter: a row that does not match is not the flow''s to delete';
alter table sitepair.parked add column if not exists layout jsonb;
comment on column sitepair.parked.whole_row is 'for operation restore: the row''s image, as in sitepair.displaced';
comment on column sitepair.parked.layout is 'for operation restore: the layout of its image';

create table if not exists sitepair.displaced (
    id bigint generated always as identity primary key,
    flow text not null,
    track text not null default 'main',
    next_offset bigint not null,
    scope text not null check (scope in ('horizon', 'transaction')),
    table_schema text not null,
    table_name text not null,
    key jsonb not null,
    whole_row text not null,
    displaced_at timestamptz not null default clock_timestamp()
);
create index if not exists displaced_key on sitepair.displaced (flow, table_schema, table_name, key);
comment on table sitepair.displaced is
    'Rows that gave way to a unique value before the horizon, whole. A later record of the key settles one; what is left at '
    'the end of the scope is put back, or parked if it conflicts.';
alter table sitepair.displaced add column if not exists layout jsonb;
comment on column sitepair.displaced.whole_row is 'the row''s image: the text of an array of its values, by column number';
comment on column sitepair.displaced.layout is
    'what reads the image: the table''s oid, and its columns by number, null for dropped ones; null: the image is the row as its '
    'composite type printed it';

create table if not exists sitepair.shadow (
    flow text not null,
    table_schema text not null,
    table_name text not null,
    key jsonb not null,
    whole_row text not null,
    saved_at timestamptz not null default clock_timestamp(),
    primary key (flow, table_schema, table_name, key)
);
comment on table sitepair.shadow is
    'Where the source is out of reach: the first image of each row that was displaced, deleted, moved or overwritten after a '
    'rewind, while the table is before its replayed_to. Values that records leave out are taken from it.';
alter table sitepair.shadow add column if not exists layout jsonb;
comment on column sitepair.shadow.whole_row is 'the row''s image, as in sitepair.displaced';
comment on column sitepair.shadow.layout is 'the layout of its image';

create table if not exists sitepair.request (
    id bigint generated always as identity primary key,
    flow text not null,
    verb text not null,
    argument jsonb not null default '{}',
    reason text,
    requested_by text not null default session_user,
    requested_at timestamptz not null default clock_timestamp(),
    taken_at timestamptz,
    ended_at timestamptz,
    answer jsonb
);
comment on table sitepair.request is 'What commands ask of a running daemon.';

-- Adopts a topic: the flow's first checkpoint, and the journal row of the topic's genesis record.
create or replace function sitepair.adopt(
    p_flow text, p_flow_id uuid, p_end_lsn pg_lsn, p_pipeline text, p_source_site text, p_target_site text,
    p_system_id numeric, p_timeline bigint, p_slot text, p_database text, p_database_oid oid
) returns void language plpgsql as $$
begin
    insert into sitepair.checkpoint (flow, flow_id, next_offset, end_lsn, horizon, pipeline, source_site, target_site,
                                     system_id, timeline, slot, source_database, source_database_oid)
    values (p_flow, p_flow_id, 1, p_end_lsn, p_end_lsn, p_pipeline, p_source_site, p_target_site,
            p_system_id, p_timeline, p_slot, p_database, p_database_oid);
    insert into sitepair.journal (flow, first_offset, last_offset, first_lsn, end_lsn, transactions, rows, counts, status,
                                  duration_ms)
    values (p_flow, 0, 0, p_end_lsn, p_end_lsn, 0, 0, '{}', 'adopted',
            extract(epoch from clock_timestamp() - now()) * 1000);
end
$$;
comment on function sitepair.adopt is 'Makes the first checkpoint of a flow from the genesis record of its topic.';

-- Moves a checkpoint by compare-and-set and writes the group's journal row.
create or replace function sitepair.advance(
    p_flow text, p_track text, p_flow_id uuid, p_from_offset bigint, p_from_lsn pg_lsn, p_next_offset bigint, p_end_lsn pg_lsn,
    p_commit_time timestamptz, p_horizon pg_lsn, p_transactions integer, p_rows bigint, p_counts jsonb, p_status text
) returns void language plpgsql as $$
begin
    update sitepair.checkpoint
       set next_offset = p_next_offset, end_lsn = p_end_lsn, commit_time = coalesce(p_commit_time, commit_time),
           horizon = p_horizon, updated_at = clock_timestamp()
     where flow = p_flow and track = p_track and flow_id = p_flow_id and next_offset = p_from_offset and end_lsn = p_from_lsn;
    if not found then
        raise exception 'the checkpoint of flow % (track %) is not at offset %, position %', p_flow, p_track, p_from_offset,
            p_from_lsn
            using errcode = 'SP001';
    end if;
    insert into sitepair.journal (flow, track, first_offset, last_offset, first_lsn, end_lsn, commit_time, transactions, rows,
                                  counts, status, duration_ms)
    values (p_flow, p_track, p_from_offset, p_next_offset - 1, p_from_lsn, p_end_lsn, p_commit_time, p_transactions, p_rows,
            p_counts, p_status, extract(epoch from clock_timestamp() - now()) * 1000);
end
$$;
comment on function sitepair.advance is
    'Moves a flow''s checkpoint if it is exactly where the caller believes it to be, else raises SP001; writes one journal row.';

-- The layout of images of a table's rows.
create or replace function sitepair.layout(p_table oid, p_columns text[]) returns jsonb language plpgsql stable as $$
declare
    columns text[];
begin
    select array_agg(case when not attisdropped then attname::text end order by attnum) into columns
      from pg_catalog.pg_attribute where attrelid = p_table and attnum > 0;
    if array_remove(columns, null) is distinct from p_columns then
        raise exception 'the columns of table % are changing', p_table::regclass using errcode = 'undefined_column';
    end if;
    return jsonb_build_object('oid', p_table::int8, 'columns', to_jsonb(columns));
end
$$;
comment on function sitepair.layout is
    'What reads the image of a row of this table; raises undefined_column where its columns are not those that the caller knows.';

-- Where an image has the value of a column.
create or replace function sitepair.place(p_layout jsonb, p_table oid, p_number integer, p_name text) returns integer
language sql immutable as $$
    select case when (p_layout->>'oid')::int8::oid = p_table
        then case when p_layout->'columns'->>(p_number - 1) is not null then p_number end
        else (select c.number::integer from jsonb_array_elements_text(p_layout->'columns') with ordinality c (name, number)
              where c.name = p_name) end
$$;
comment on function sitepair.place is
    'The place of a column in an image: by number in the same table, by name in one made anew; null for a column that the image lacks.';
