//! What the daemon's login may and may not do, asked with `has_*_privilege` of that login, so that the administrator's
//! own rights hide nothing.

use std::collections::BTreeSet;

use crate::config::TruncatePolicy;
use crate::model::names::quote_ident;
use crate::model::{Result, TableName};
use crate::postgres::sqlstate;
use crate::rules::Selected;

use super::finding::Findings;
use super::script::{File, SOURCE_GRANTS, TARGET_GRANTS, TARGET_SERVER_GRANTS};
use super::server::Node;

/// Functions that the reader calls; public unless somebody revoked that.
const SOURCE_FUNCTIONS: [&str; 3] =
    ["pg_logical_emit_message", "pg_current_wal_flush_lsn", "pg_current_wal_insert_lsn"];
/// Functions that the applier calls; a superuser's unless granted.
const TARGET_FUNCTIONS: [&str; 7] = [
    "pg_replication_origin_progress",
    "pg_replication_origin_session_setup",
    "pg_replication_origin_session_reset",
    "pg_replication_origin_session_is_setup",
    "pg_replication_origin_session_progress",
    "pg_replication_origin_xact_setup",
    "pg_replication_origin_xact_reset",
];

/// A right that the login lacks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Missing {
    /// On what.
    subject: String,
    /// Which.
    what: String,
    /// The statement that gives it.
    pub(super) grant: String,
    /// The file that gives it, among others.
    pub(super) file: Option<File>,
    /// The administrative session may run it.
    pub(super) grantable: bool,
}

impl Missing {
    /// The finding: it blocks unless this deploy can grant the right itself.
    pub(super) fn report(&self, found: &mut Findings<'_>) {
        if self.grantable {
            found.info(&self.subject, format!("{}; deploy grants it", self.what), &self.grant);
        } else {
            found.blocking(&self.subject, &self.what, &self.grant);
        }
    }
}

/// What the login lacks at a source. Tables that can't be looked at because the login's role does not exist are left
/// out: that is a finding of its own.
pub(super) async fn missing_at_source(node: &Node<'_>, tables: &[Selected]) -> Result<Vec<Missing>> {
    if !node.login.exists {
        return Ok(Vec::new());
    }
    let mut missing = functions(node, &SOURCE_FUNCTIONS, None).await?;
    missing.extend(schemas(node, tables.iter().map(|selected| &selected.table.table)).await?);
    missing.extend(readable(node, tables).await?);
    missing.extend(installed(node, HOLDS_SOURCE, SOURCE_GRANTS).await?);
    Ok(missing)
}

/// What the login lacks at a target; `tables` are (selected, OID at the target).
pub(super) async fn missing_at_target(node: &Node<'_>, tables: &[(&Selected, u32)]) -> Result<Vec<Missing>> {
    if !node.login.exists {
        return Ok(Vec::new());
    }
    let mut missing = functions(node, &TARGET_FUNCTIONS, Some(TARGET_SERVER_GRANTS)).await?;
    missing.extend(server(node).await?);
    missing.extend(schemas(node, tables.iter().map(|(selected, _)| &selected.table.table)).await?);
    missing.extend(writable(node, tables).await?);
    missing.extend(installed(node, HOLDS_TARGET, TARGET_GRANTS).await?);
    Ok(missing)
}

async fn functions(node: &Node<'_>, names: &[&str], file: Option<File>) -> Result<Vec<Missing>> {
    let sql = "SELECT format('%I.%I(%s)', 'pg_catalog', proname, pg_get_function_identity_arguments(oid)), \
                      has_function_privilege(oid, 'EXECUTE WITH GRANT OPTION') \
               FROM pg_proc WHERE pronamespace = 'pg_catalog'::regnamespace AND proname = ANY ($2) \
                 AND NOT has_function_privilege($1::text::name, oid, 'EXECUTE') ORDER BY 1";
    let names: Vec<&str> = names.to_vec();
    let rows = node.session.query(sql, &[&node.login.name, &names]).await.map_err(|error| fault(node, &error))?;
    let role = quote_ident(&node.login.name);
    let missing = |function: String, grantable| Missing {
        what: format!("{} may not execute it", node.login.name),
        grant: format!("GRANT EXECUTE ON FUNCTION {function} TO {role};"),
        subject: format!("function {function}"),
        file,
        grantable,
    };
    Ok(rows.iter().map(|row| missing(row.get(0), row.get(1))).collect())
}

/// Rights on the server and the database that the applier needs.
async fn server(node: &Node<'_>) -> Result<Vec<Missing>> {
    let sql = "SELECT has_parameter_privilege($1::text::name, 'session_replication_role', 'SET'), \
                      has_parameter_privilege('session_replication_role', 'SET WITH GRANT OPTION'), \
                      has_database_privilege($1::text::name, current_database(), 'TEMP'), \
                      has_database_privilege(current_database(), 'TEMP WITH GRANT OPTION')";
    let row = node.session.query_one(sql, &[&node.login.name]).await.map_err(|error| fault(node, &error))?;
    let (name, role) = (&node.login.name, quote_ident(&node.login.name));
    let database = &node.server.database;
    let rights = [
        (
            "session_replication_role".to_owned(),
            format!("{name} may not set it"),
            format!("GRANT SET ON PARAMETER session_replication_role TO {role};"),
        ),
        (
            format!("database {database}"),
            format!("{name} may not create temporary tables"),
            format!("GRANT TEMPORARY ON DATABASE {} TO {role};", quote_ident(database)),
        ),
    ];
    let lacking = rights.into_iter().enumerate().filter(|(index, _)| !row.get::<_, bool>(2 * index));
    Ok(lacking
        .map(|(index, (subject, what, grant))| Missing {
            subject,
            what,
            grant,
            file: Some(TARGET_SERVER_GRANTS),
            grantable: row.get(2 * index + 1),
        })
        .collect())
}

async fn schemas(node: &Node<'_>, tables: impl Iterator<Item = &TableName>) -> Result<Vec<Missing>> {
    let names: BTreeSet<&str> = tables.map(|table| table.schema.as_str()).collect();
    let names: Vec<&str> = names.into_iter().collect();
    let sql = "SELECT nspname::text, has_schema_privilege(oid, 'USAGE WITH GRANT OPTION') FROM pg_namespace \
               WHERE nspname = ANY ($2) AND NOT has_schema_privilege($1::text::name, oid, 'USAGE') ORDER BY 1";
    let rows = node.session.query(sql, &[&node.login.name, &names]).await.map_err(|error| fault(node, &error))?;
    let missing = |schema: String, grantable| Missing {
        what: format!("{} may not use it", node.login.name),
        grant: format!("GRANT USAGE ON SCHEMA {} TO {};", quote_ident(&schema), quote_ident(&node.login.name)),
        subject: format!("schema {schema}"),
        file: None,
        grantable,
    };
    Ok(rows.iter().map(|row| missing(row.get(0), row.get(1))).collect())
}

/// SELECT on what crosses: the table, or each column that does.
async fn readable(node: &Node<'_>, tables: &[Selected]) -> Result<Vec<Missing>> {
    let (mut oids, mut columns) = (Vec::new(), Vec::new());
    for selected in tables {
        for column in &selected.columns {
            oids.push(selected.table.oid);
            columns.push(column.as_str());
        }
    }
    let sql = "SELECT DISTINCT c.oid, has_table_privilege(c.oid, 'SELECT WITH GRANT OPTION') \
               FROM unnest($2::oid[], $3::text[]) AS crossing (oid, name) JOIN pg_class c USING (oid) \
               WHERE NOT has_column_privilege($1::text::name, c.oid, crossing.name, 'SELECT')";
    let rows =
        node.session.query(sql, &[&node.login.name, &oids, &columns]).await.map_err(|error| fault(node, &error))?;
    let lacking = |selected: &Selected| rows.iter().find(|row| row.get::<_, u32>(0) == selected.table.oid);
    Ok(tables
        .iter()
        .filter_map(|selected| {
            let grantable = lacking(selected)?.get(1);
            Some(Missing {
                subject: format!("table {}", selected.table.table),
                what: format!("{} may not SELECT it", node.login.name),
                grant: grant_select(selected, &node.login.name),
                file: None,
                grantable,
            })
        })
        .collect())
}

/// The SELECT that the reader needs: of the columns that cross, where not all do.
pub(super) fn grant_select(selected: &Selected, login: &str) -> String {
    let columns = if selected.columns.len() == selected.table.columns.len() {
        String::new()
    } else {
        let names: Vec<String> = selected.columns.iter().map(|name| quote_ident(name)).collect();
        format!(" ({})", names.join(", "))
    };
    format!("GRANT SELECT{columns} ON TABLE {} TO {};", selected.table.table.sql(), quote_ident(login))
}

/// What the applier needs of a table at the target.
pub(super) fn write_privileges(selected: &Selected) -> Vec<&'static str> {
    let mut privileges = vec!["SELECT", "INSERT", "UPDATE", "DELETE"];
    match selected.truncate {
        TruncatePolicy::Apply => privileges.push("TRUNCATE"),
        TruncatePolicy::Ignore | TruncatePolicy::Stop => {}
    }
    privileges
}

async fn writable(node: &Node<'_>, tables: &[(&Selected, u32)]) -> Result<Vec<Missing>> {
    let (mut oids, mut privileges) = (Vec::new(), Vec::new());
    for (selected, oid) in tables {
        for privilege in write_privileges(selected) {
            oids.push(*oid);
            privileges.push(privilege);
        }
    }
    let sql = "SELECT wanted.oid, wanted.privilege, \
                      has_table_privilege(wanted.oid, wanted.privilege || ' WITH GRANT OPTION') \
               FROM unnest($2::oid[], $3::text[]) AS wanted (oid, privilege) \
               WHERE NOT has_table_privilege($1::text::name, wanted.oid, wanted.privilege)";
    let rows =
        node.session.query(sql, &[&node.login.name, &oids, &privileges]).await.map_err(|error| fault(node, &error))?;
    let role = quote_ident(&node.login.name);
    let mut missing = Vec::new();
    for (selected, oid) in tables {
        let lacking: Vec<_> = rows.iter().filter(|row| row.get::<_, u32>(0) == *oid).collect();
        if lacking.is_empty() {
            continue;
        }
        let names: Vec<&str> = lacking.iter().map(|row| row.get(1)).collect();
        let table = &selected.table.table;
        missing.push(Missing {
            subject: format!("table {table}"),
            what: format!("{} may not {} it", node.login.name, names.join(", ")),
            grant: format!("GRANT {} ON TABLE {} TO {role};", names.join(", "), table.sql()),
            file: None,
            grantable: lacking.iter().all(|row| row.get(2)),
        });
    }
    Ok(missing)
}

/// What the login needs of its own tables at a source; no row where nothing is installed yet (the file that installs is
/// followed by the one that grants).
const HOLDS_SOURCE: &str = "\
    SELECT bool_and(has_schema_privilege($1::text::name, c.relnamespace, 'USAGE') \
                    AND has_table_privilege($1::text::name, c.oid, 'SELECT') \
                    AND (c.relname <> 'flow' OR has_column_privilege($1::text::name, c.oid, 'timeline', 'UPDATE') \
                        AND has_column_privilege($1::text::name, c.oid, 'entering', 'UPDATE')) \
                    AND (c.relname <> 'topic_copy' OR has_table_privilege($1::text::name, c.oid, 'INSERT') \
                        AND has_table_privilege($1::text::name, c.oid, 'UPDATE') \
                        AND has_table_privilege($1::text::name, c.oid, 'DELETE'))), \
           bool_and(pg_has_role(c.relowner, 'USAGE')) \
    FROM pg_class c WHERE c.relnamespace = to_regnamespace('sitepair') AND c.relname IN ('flow', 'installed', 'topic_copy') \
    HAVING count(*) > 0";

/// Likewise at a target.
const HOLDS_TARGET: &str = "\
    SELECT bool_and(has_schema_privilege($1::text::name, c.relnamespace, 'USAGE') \
                    AND CASE relkind WHEN 'S' THEN has_sequence_privilege($1::text::name, c.oid, 'USAGE') \
                             ELSE has_table_privilege($1::text::name, c.oid, privilege) END), \
           bool_and(pg_has_role(c.relowner, 'USAGE')) \
    FROM pg_class c, unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS wanted (privilege) \
    WHERE c.relnamespace = to_regnamespace('sitepair') AND c.relkind IN ('r', 'S') \
      AND (c.relname NOT IN ('flow', 'installed') OR privilege = 'SELECT') \
    HAVING count(*) > 0";

/// Rights on what sitepair itself installed.
async fn installed(node: &Node<'_>, sql: &str, file: File) -> Result<Vec<Missing>> {
    let row = node.session.query_opt(sql, &[&node.login.name]).await.map_err(|error| fault(node, &error))?;
    let Some(row) = row.filter(|row| !row.get::<_, bool>(0)) else { return Ok(Vec::new()) };
    let text = file.render(&node.values())?;
    let statements: Vec<&str> = text.lines().filter(|line| !line.is_empty() && !line.starts_with("--")).collect();
    Ok(vec![Missing {
        subject: "schema sitepair".to_owned(),
        what: format!("{} may not use all of it", node.login.name),
        grant: statements.join(" "),
        file: Some(file),
        grantable: row.get(1),
    }])
}

fn fault(node: &Node<'_>, error: &tokio_postgres::Error) -> crate::model::Fault {
    sqlstate::fault(error).at(node.name())
}
