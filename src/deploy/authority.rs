//! What the administrative session itself may do, so that a deploy does not fail half-way.

use crate::model::names::quote_ident;
use crate::model::{Result, TableName};
use crate::postgres::sqlstate;

use super::finding::Findings;
use super::server::Node;
use super::step::{End, Step};

/// Findings for steps at `end` that the administrative session may not run.
pub(super) async fn check(
    node: &Node<'_>,
    end: End,
    steps: &[Step],
    tables: &[&TableName],
    found: &mut Findings<'_>,
) -> Result<()> {
    let installs = steps.iter().any(|step| matches!(step, Step::Run { end: at, .. } if *at == end));
    let publishes =
        end == End::Source && steps.iter().any(|step| matches!(step, Step::Publish { .. } | Step::Enter { .. }));
    let origin = end == End::Target && steps.iter().any(|step| matches!(step, Step::Origin { .. }));
    let sql = "SELECT current_user::text, has_database_privilege(current_database(), 'CREATE'), \
                      has_function_privilege('pg_catalog.pg_replication_origin_create(text)', 'EXECUTE'), \
                      ARRAY(SELECT format('%I.%I', n.nspname, c.relname) FROM unnest($1::text[], $2::text[]) AS t (schema, name) \
                            JOIN pg_namespace n ON n.nspname = t.schema \
                            JOIN pg_class c ON c.relname = t.name AND c.relnamespace = n.oid \
                            WHERE NOT pg_has_role(c.relowner, 'USAGE') ORDER BY 1)";
    let schemas: Vec<&str> = tables.iter().map(|table| table.schema.as_str()).collect();
    let names: Vec<&str> = tables.iter().map(|table| table.name.as_str()).collect();
    let row = node.session.query_one(sql, &[&schemas, &names]).await;
    let row = row.map_err(|error| sqlstate::fault(&error).at(node.name()))?;
    let user: String = row.get(0);
    let (subject, role) = (format!("role {user}"), quote_ident(&user));
    let otherwise = "set admin in the pipeline file, or have a DBA run what `sitepair deploy --print` prints";
    if (installs || publishes) && !row.get::<_, bool>(1) {
        let grant = format!("GRANT CREATE ON DATABASE {} TO {role};", quote_ident(&node.server.database));
        found.blocking(
            &subject,
            "may not create what deploy installs in this database",
            format!("{grant} -- or {otherwise}"),
        );
    }
    let foreign: Vec<String> = row.get(3);
    if publishes && !foreign.is_empty() {
        let what = format!("may not publish tables that it does not own: {}", foreign.join(", "));
        found.blocking(&subject, what, otherwise);
    }
    if origin && !row.get::<_, bool>(2) {
        let grant = format!("GRANT EXECUTE ON FUNCTION pg_catalog.pg_replication_origin_create(text) TO {role};");
        found.blocking(&subject, "may not create a replication origin", format!("{grant} -- or {otherwise}"));
    }
    Ok(())
}
