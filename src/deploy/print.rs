//! `deploy --print`: the same deployment as a psql script, for a DBA who runs it instead.

use std::fmt::Write;

use crate::config::{ConnInfo, Pipeline, SslMode};
use crate::model::names::{quote_ident, quote_literal};
use crate::model::{Code, Fault, Result, TableName};
use crate::postgres::flow;
use crate::rules::Selected;

use super::finding::Severity;
use super::plan::FlowPlan;
use super::publication;
use super::rights;
use super::script::{self, File};
use super::server::Node;
use super::slot;
use super::step::{self, End, Step};
use super::topic::Survey;

/// What the script opens with.
pub(super) fn head(pipeline: &Pipeline) -> String {
    format!(
        "-- Installs pipeline {} as `sitepair deploy` would. Run it with psql as an administrator of each site:\n\
         --   psql -X -f THIS_FILE\n\
         -- It may be run again at any time. Each \\connect says where the part below it belongs.\n\
         \\set ON_ERROR_STOP on\n",
        pipeline.name
    )
}

/// The part of one flow: its topic where that is not there by itself, its target, then its source.
pub(super) fn flow(plan: &FlowPlan<'_>, topic: &Survey) -> Result<String> {
    if let Some(guard) = &plan.guard {
        return Err(guard.clone());
    }
    let (Some(source), Some(target)) = (plan.source, plan.target) else {
        return Err(Fault::new(Code::Usage, "the script needs both sites: leave out --only"));
    };
    if plan.selected.is_empty() {
        let first =
            plan.findings.first().map_or(String::new(), |finding| format!(": {} {}", finding.subject, finding.what));
        return Err(Fault::new(Code::Blocked, format!("no tables that could be published{first}")));
    }
    let mut text = format!("\n-- Flow {}\n", plan.flow);
    let findings = plan.findings.iter().chain(&topic.findings);
    for finding in findings.filter(|finding| finding.severity == Severity::Blocking) {
        let line = format!("{}: {} {}: {}", finding.site, finding.subject, finding.what, finding.remedy);
        text.push_str(&format!("-- blocks unless this script mends it: {}\n", line.replace(['\n', '\r'], " ")));
    }
    text.push_str(&topic_part(topic));
    text.push_str(&target_part(plan, target));
    text.push_str(&source_part(plan, source));
    Ok(text)
}

/// What psql can't do, and must be done before: a flow without its topic would only hold WAL back.
fn topic_part(topic: &Survey) -> String {
    let mut text = String::new();
    for change in &topic.changes {
        line(&mut text, &format!("-- {}: before this script, with Kafka's tools, run", change.what));
        line(&mut text, &format!("-- {}", change.sql));
    }
    text
}

fn target_part(plan: &FlowPlan<'_>, target: &Node<'_>) -> String {
    let role = quote_ident(&target.login.name);
    let mut text = connect(target, "the target");
    for file in [script::SCHEMA, script::TARGET] {
        text.push_str(&file_part(file, true));
    }
    for file in [script::TARGET_GRANTS, script::TARGET_SERVER_GRANTS] {
        text.push_str(&file_part(file, false));
    }
    text.push_str(&schema_grants(plan, &role));
    for selected in &plan.selected {
        let privileges = rights::write_privileges(selected).join(", ");
        line(&mut text, &format!("GRANT {privileges} ON TABLE {} TO {role};", selected.table.table.sql()));
    }
    text.push_str(&lacking(plan, End::Target));
    for origin in plan.flow.origins().map(|name| quote_literal(&name)) {
        line(
            &mut text,
            &format!(
                "SELECT pg_replication_origin_create({origin}) WHERE NOT EXISTS (SELECT FROM pg_replication_origin WHERE roname = {origin});"
            ),
        );
    }
    text
}

fn source_part(plan: &FlowPlan<'_>, source: &Node<'_>) -> String {
    let role = quote_ident(&source.login.name);
    let mut text = connect(source, "the source");
    for file in [script::SCHEMA, script::SOURCE] {
        text.push_str(&file_part(file, true));
    }
    text.push_str(&file_part(script::SOURCE_GRANTS, false));
    if !source.login.superuser {
        line(&mut text, &format!("ALTER ROLE {role} REPLICATION;"));
    }
    text.push_str(&schema_grants(plan, &role));
    for selected in &plan.selected {
        line(&mut text, &rights::grant_select(selected, &source.login.name));
    }
    text.push_str(&lacking(plan, End::Source));
    text.push_str(&left_out(plan));
    text.push_str(&slot_part(plan, source));
    text
}

/// What changes a publication that a reader follows: `deploy` alone does it, since a script can't be run twice there.
fn left_out(plan: &FlowPlan<'_>) -> String {
    let running = !plan.steps.iter().any(|step| matches!(step, Step::Start { .. }));
    let changes = plan.steps.iter().filter(|step| match step {
        Step::Publish { .. } | Step::Enter { .. } | Step::Settle { .. } | Step::Filters { .. } => running,
        Step::Run { .. } | Step::Grant { .. } | Step::Origin { .. } | Step::Join | Step::Start { .. } => false,
    });
    changes.map(|step| format!("-- left to `sitepair deploy`: {}\n", step.change(plan.flow).what)).collect()
}

/// Publication, slot and the flow's row.
fn slot_part(plan: &FlowPlan<'_>, source: &Node<'_>) -> String {
    let (object, flow) = (plan.flow.object(), quote_literal(&plan.flow.to_string()));
    let (slot, publication) = (quote_literal(&object), quote_ident(&object));
    let lane = plan.flow.lane.as_deref().map_or("NULL".to_owned(), quote_literal);
    let filters = step::set_filters_sql(plan.flow, &step::filters(&plan.selected));
    let join = if plan.flow.shared {
        let note = "-- Another flow reads the slot: this one begins at the topic's end.";
        format!("\\elif :is_read\n{note}\nBEGIN;\n{};\n{filters}\nCOMMIT;\n", flow::join_sql(plan.flow))
    } else {
        String::new()
    };
    format!(
        "\
SELECT EXISTS (SELECT FROM sitepair.flow WHERE flow = {flow} AND start_lsn IS NOT NULL) AS deployed,
       EXISTS (SELECT FROM sitepair.flow WHERE slot = {slot} AND start_lsn IS NOT NULL) AS is_read \\gset
\\if :deployed
\\echo flow {plain} is deployed already: its publication and slot stay as they are
{join}\\else
DO $$BEGIN
    IF EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = {slot})
       AND NOT EXISTS (SELECT FROM sitepair.flow WHERE slot = {slot}) THEN
        RAISE EXCEPTION 'slot {object} exists, and sitepair.flow knows nothing of it'
            USING HINT = 'If nobody needs it, drop it by pg_drop_replication_slot and run this script again.';
    END IF;
END$$;
BEGIN;
DROP PUBLICATION IF EXISTS {publication};
{create}
COMMIT;
INSERT INTO sitepair.flow (flow, flow_id, pipeline, lane, from_site, to_site, system_id, timeline, slot, database, database_oid)
    SELECT {flow}, gen_random_uuid(), {pipeline}, {lane}, {from}, {to},
           CASE WHEN s.system_identifier < 0 THEN s.system_identifier + 18446744073709551616.0 ELSE s.system_identifier END,
           c.timeline_id, {slot}, d.datname, d.oid
    FROM pg_control_system() s, pg_control_checkpoint() c, pg_database d WHERE d.datname = current_database()
    ON CONFLICT (flow) DO UPDATE SET flow_id = excluded.flow_id, start_lsn = NULL, system_id = excluded.system_id,
        timeline = excluded.timeline, slot = excluded.slot, database = excluded.database,
        database_oid = excluded.database_oid, entering = '{{}}', entering_xmax = NULL, slot_dropped = NULL, created_at = now();
SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = {slot};
-- Waits until every transaction that is running now has ended.
SELECT lsn AS start_lsn FROM {call} \\gset
{filters}
UPDATE sitepair.flow SET start_lsn = :'start_lsn' WHERE flow = {flow};
\\endif
",
        plain = plan.flow,
        create = publication::create_sql(&object, &plan.selected),
        pipeline = quote_literal(&plan.flow.pipeline),
        from = quote_literal(&plan.flow.from),
        to = quote_literal(&plan.flow.to),
        call = slot::create_call(&object, source.server.version),
    )
}

fn schema_grants(plan: &FlowPlan<'_>, role: &str) -> String {
    let table = |selected: &Selected| -> TableName { selected.table.table.clone() };
    let mut schemas: Vec<String> = plan.selected.iter().map(|selected| table(selected).schema).collect();
    schemas.sort();
    schemas.dedup();
    let grant = |schema: &String| format!("GRANT USAGE ON SCHEMA {} TO {role};\n", quote_ident(schema));
    schemas.iter().map(grant).collect()
}

/// Rights that were found missing and that no file and no table's GRANT above gives.
fn lacking(plan: &FlowPlan<'_>, end: End) -> String {
    let functions = plan.steps.iter().filter_map(|step| match step {
        Step::Grant { end: at, sql } if *at == end && sql.contains(" ON FUNCTION ") => Some(format!("{sql}\n")),
        _ => None,
    });
    functions.collect()
}

/// A file of `sql/` as it is; psql fills in `:"login"` and `:"database"`.
fn file_part(file: File, noted: bool) -> String {
    let note = if noted { format!("{}\n", file.note()) } else { String::new() };
    format!("\n-- sql/{}\n{}{note}\n", file.name, file.text)
}

fn connect(node: &Node<'_>, what: &str) -> String {
    format!(
        "\n-- Site {}, {what}\n\\connect {}\n\\set login {}\n\\set database {}\n",
        node.name(),
        psql_quoted(&conninfo(&node.site.admin)),
        psql_quoted(&node.login.name),
        psql_quoted(&node.server.database),
    )
}

fn line(text: &mut String, statement: &str) {
    // Writing to a String can't fail.
    let _ = writeln!(text, "{statement}");
}

/// A psql meta-command's argument: single quotes doubled, backslashes too (PostgreSQL manual, psql, "Meta-Commands").
fn psql_quoted(text: &str) -> String {
    format!("'{}'", text.replace('\\', "\\\\").replace('\'', "''"))
}

/// libpq keywords, without the password.
fn conninfo(info: &ConnInfo) -> String {
    let list =
        |pick: &dyn Fn(&crate::config::HostPort) -> String| info.hosts.iter().map(pick).collect::<Vec<_>>().join(",");
    let sslmode = match info.sslmode {
        SslMode::Disable => "disable",
        SslMode::Allow => "allow",
        SslMode::Prefer => "prefer",
        SslMode::Require => "require",
        SslMode::VerifyCa => "verify-ca",
        SslMode::VerifyFull => "verify-full",
    };
    let path = |path: &Option<std::path::PathBuf>| path.as_ref().map(|path| path.display().to_string());
    let has_address = info.hosts.iter().any(|host| host.hostaddr.is_some());
    let keywords = [
        ("host", Some(list(&|host| host.host.clone()))),
        ("hostaddr", has_address.then(|| list(&|host| host.hostaddr.clone().unwrap_or_default()))),
        ("port", Some(list(&|host| host.port.to_string()))),
        ("dbname", Some(info.dbname.clone())),
        ("user", Some(info.user.clone())),
        ("sslmode", Some(sslmode.to_owned())),
        ("sslrootcert", info.sslrootcert.clone()),
        ("sslcert", path(&info.sslcert)),
        ("sslkey", path(&info.sslkey)),
    ];
    let written =
        keywords.into_iter().filter_map(|(keyword, value)| Some(format!("{keyword}={}", conninfo_value(&value?))));
    written.collect::<Vec<_>>().join(" ")
}

/// A value in a connection string, quoted where it must be (PostgreSQL manual, section 34.1.1.1).
fn conninfo_value(value: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-,/:@".contains(c);
    if !value.is_empty() && value.chars().all(plain) {
        return value.to_owned();
    }
    format!("'{}'", value.replace('\\', "\\\\").replace('\'', "\\'"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_levels_of_quoting() {
        assert_eq!(conninfo_value("db.example"), "db.example");
        assert_eq!(conninfo_value("o'ne \\ two"), r"'o\'ne \\ two'");
        assert_eq!(psql_quoted(r"user='o\'ne'"), r"'user=''o\\''ne'''");
    }
}
