-- Every table of the database that could be replicated, a row each; one statement, so one snapshot.
-- Runs with an empty search_path: unqualified names are those of pg_catalog.
WITH RECURSIVE
database_collation AS (
    -- Provider c (libc): by datcollate; b (builtin, from 17 on): always by code point; i (ICU): by its locale.
    SELECT CASE WHEN datlocprovider = 'b' OR (datlocprovider = 'c' AND datcollate IN ('C', 'POSIX'))
                THEN 'c' ELSE 'd' END AS class
    FROM pg_database WHERE datname = current_database()
),
-- Each table with itself and its partitions, at every depth.
tree (root, member) AS (
    SELECT oid, oid FROM pg_class WHERE relkind IN ('r', 'p', 'f')
    UNION ALL
    SELECT tree.root, inhrelid FROM tree JOIN pg_inherits ON inhparent = tree.member
    JOIN pg_class child ON child.oid = inhrelid AND child.relispartition
),
-- What holds for a table only if it holds for all its partitions. A replica identity index that was dropped leaves no
-- identity at all.
whole (oid, identity, logged) AS (
    SELECT root, string_agg(DISTINCT CASE WHEN relreplident = 'i' AND NOT EXISTS (
            SELECT FROM pg_index WHERE indrelid = member AND indisreplident) THEN 'n' ELSE relreplident::text END, ''),
        bool_and(relpersistence = 'p')
    FROM tree JOIN pg_class ON oid = member GROUP BY root
),
triggers (oid, names) AS (
    SELECT root, json_agg(DISTINCT tgname::text) FROM tree JOIN pg_trigger ON tgrelid = member
    WHERE NOT tgisinternal AND tgenabled IN ('A', 'R') GROUP BY root
),
-- Joined, not asked for each table: there is no index by the table that is referenced.
referencing (oid, tables) AS (
    SELECT k.confrelid, json_agg(DISTINCT jsonb_build_array(rn.nspname, r.relname))
    FROM pg_constraint k JOIN pg_class r ON r.oid = k.conrelid JOIN pg_namespace rn ON rn.oid = r.relnamespace
    WHERE k.contype = 'f' AND k.conparentid = 0 AND k.conrelid <> k.confrelid GROUP BY k.confrelid
),
-- From each domain through domains to the type below them. Other types are not listed: each table has two of its own.
domains (type, oid) AS (
    SELECT oid, typbasetype FROM pg_type WHERE typtype = 'd'
    UNION ALL
    SELECT domains.type, d.typbasetype FROM domains JOIN pg_type d ON d.oid = domains.oid AND d.typtype = 'd'
)
SELECT
    c.oid,
    n.nspname::text,
    c.relname::text,
    CASE WHEN c.relkind NOT IN ('r', 'p') AND NOT c.relispartition THEN 'other'
         WHEN c.relispartition THEN 'partition'
         WHEN c.relkind = 'p' THEN 'root'
         ELSE 'plain' END,
    coalesce(whole.identity, 'n'),
    coalesce(whole.logged, c.relpersistence = 'p'),
    c.relrowsecurity,
    has_schema_privilege(n.oid, 'USAGE') AND (has_table_privilege(c.oid, 'SELECT') OR NOT EXISTS (
        SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        AND NOT has_column_privilege(c.oid, a.attnum, 'SELECT'))),
    coalesce((SELECT json_agg(json_build_object(
            'name', a.attname,
            'type_oid', a.atttypid::int8,
            'type_sql', CASE
                WHEN tn.nspname = 'pg_catalog' THEN format_type(t.oid, -1)
                WHEN e.oid IS NOT NULL THEN format('"%s"."%s"[]',
                    replace(en.nspname, '"', '""'), replace(e.typname, '"', '""'))
                ELSE format('"%s"."%s"', replace(tn.nspname, '"', '""'), replace(t.typname, '"', '""')) END,
            'typmod', a.atttypmod,
            'type_kind', t.typtype,
            'base_type_oid', below.oid::int8,
            'array_oid', t.typarray::int8,
            'is_array', t.typsubscript = 'array_subscript_handler'::regproc,
            -- From 18 on a NOT NULL constraint may be there without having been checked.
            'not_null', a.attnotnull AND NOT EXISTS (
                SELECT FROM pg_constraint k WHERE k.conrelid = c.oid AND k.contype = 'n' AND NOT k.convalidated
                AND a.attnum = ANY (k.conkey)),
            'generated', a.attgenerated,
            'identity', a.attidentity,
            'collation', CASE
                WHEN co.oid IS NULL THEN ''
                WHEN NOT co.collisdeterministic THEN 'n'
                WHEN co.collprovider = 'd' THEN (SELECT class FROM database_collation)
                WHEN co.collprovider = 'b' OR (co.collprovider = 'c' AND co.collcollate IN ('C', 'POSIX')) THEN 'c'
                ELSE 'd' END,
            'enum_labels', coalesce((SELECT json_agg(enumlabel ORDER BY enumsortorder)
                FROM pg_enum WHERE enumtypid = below.oid), '[]')
        ) ORDER BY a.attnum)
        FROM pg_attribute a
        JOIN pg_type t ON t.oid = a.atttypid
        JOIN pg_namespace tn ON tn.oid = t.typnamespace
        JOIN pg_type below ON below.oid = CASE WHEN t.typtype <> 'd' THEN t.oid ELSE (
            SELECT domains.oid FROM domains JOIN pg_type leaf ON leaf.oid = domains.oid AND leaf.typtype <> 'd'
            WHERE domains.type = t.oid) END
        LEFT JOIN pg_type e ON e.oid = t.typelem AND t.typsubscript = 'array_subscript_handler'::regproc
        LEFT JOIN pg_namespace en ON en.oid = e.typnamespace
        LEFT JOIN pg_collation co ON co.oid = a.attcollation
        WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped), '[]')::text,
    coalesce((SELECT json_agg(json_build_object(
            'name', ic.relname,
            'columns', CASE WHEN 0 = ANY (i.indkey::int2[]) THEN '[]' ELSE (
                SELECT json_agg(a.attname ORDER BY k.position)
                FROM unnest(i.indkey::int2[]) WITH ORDINALITY AS k (attnum, position)
                JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.attnum
                WHERE k.position <= i.indnkeyatts) END,
            'primary', i.indisprimary,
            'deferrable', NOT i.indimmediate,
            'partial', i.indpred IS NOT NULL,
            'exclusion', i.indisexclusion,
            'replica_identity', i.indisreplident
        ) ORDER BY ic.relname)
        FROM pg_index i JOIN pg_class ic ON ic.oid = i.indexrelid
        WHERE i.indrelid = c.oid AND (i.indisunique OR i.indisexclusion) AND i.indisvalid), '[]')::text,
    coalesce(referencing.tables, '[]')::text,
    coalesce(triggers.names, '[]')::text
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN whole ON whole.oid = c.oid
LEFT JOIN triggers ON triggers.oid = c.oid
LEFT JOIN referencing ON referencing.oid = c.oid
WHERE c.relkind IN ('r', 'p', 'f', 'v', 'm')
    AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'sitepair')
    AND n.nspname !~ '^pg_(toast|temp)'
ORDER BY n.nspname COLLATE "C", c.relname COLLATE "C"
