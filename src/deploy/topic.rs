//! The topic: what `plan` finds of it in Kafka, what `deploy` makes there, what `undeploy` removes. An embedded topic makes itself;
//! `undeploy` moves it aside.
//!
//! Findings and changes name the site that the flow comes from: its node writes.

use bytesize::ByteSize;

use crate::config::{CopyWay, Pipeline, Topic as Configured, TopicKind};
use crate::model::{Code, Fault, FlowName, Result, TableName};
use crate::ports::TopicReader;
use crate::postgres::flow::FlowState;
use crate::postgres::{size, topic_copy};
use crate::rules::Selected;
use crate::topic::kafka::{Admin, Cluster, Standing, Topic};
use crate::topic::{Aside, set_aside};

use super::finding::{Change, Finding, Findings, Severity};
use super::server::Node;

/// Replicas where there are brokers enough: one may die, and one more be restarted, without a loss.
const REPLICAS: usize = 3;
/// Records are at most this large, headers included.
const RECORD_BYTES: u64 = 1_000_000;
/// Kafka's default for `max.message.bytes`.
const MAX_MESSAGE_BYTES: u64 = 1_048_588;

/// What stands in the way and what is missing.
#[derive(Debug, Default)]
pub(super) struct Survey {
    pub findings: Vec<Finding>,
    pub changes: Vec<Change>,
}

/// Looks at the topic of a flow. `state` is what the source knows of the flow, where it was asked.
pub(super) async fn survey(pipeline: &Pipeline, flow: &FlowName, state: Option<&FlowState>) -> Result<Survey> {
    let TopicKind::Kafka(kafka) = &pipeline.topic.kind else { return Ok(Survey::default()) };
    let cluster = Cluster::new(kafka, flow);
    let standing = Admin::open(&cluster)?.standing().await?;
    let mut found = Findings::at(&flow.from);
    let subject = format!("Kafka topic {}", cluster.topic);
    let mut survey = Survey::default();
    let wanted = Wanted::of(&pipeline.topic, standing.brokers);
    if wanted.replicas < REPLICAS {
        let what = format!("{} brokers live, so a record has {} replicas", standing.brokers, wanted.replicas);
        found.warning("Kafka", what, format!("run {REPLICAS} brokers: then one may die without a loss or a pause"));
    }
    match &standing {
        Standing { topic: None, .. } => {
            if let Some(FlowState::Deployed(_)) = state {
                let what = "is gone, and the flow was deployed: records may be lost";
                found.warning(&subject, what, "deploy makes it anew; if the reader then stops, run `sitepair resync`");
            }
            survey.changes.push(wanted.change(&cluster, flow));
        }
        Standing { topic: Some(topic), .. } => {
            wanted.check(topic, &subject, &mut found);
            left_over(&cluster, state, &subject, &mut found).await?;
        }
    }
    let hours = pipeline.topic.retention_age.as_secs() / 3600;
    let what =
        format!("Kafka drops records after {hours} h or {} bytes, applied or not", pipeline.topic.retention_bytes);
    found.info(
        subject,
        what,
        "set retention to more than the longest outage of the target; a gap stops the flow with exit code 4",
    );
    survey.findings = found.into_vec();
    Ok(survey)
}

/// Whether the topic has room for a copy that travels through it: for the rows that the reader's node has not sent yet.
pub(super) async fn check_copy(
    pipeline: &Pipeline,
    source: &Node<'_>,
    state: &FlowState,
    selected: &[Selected],
    found: &mut Findings<'_>,
) -> Result<()> {
    if pipeline.copy.through == CopyWay::Source {
        return Ok(());
    }
    let at = |fault: Fault| fault.at(source.name());
    let copies = match state {
        FlowState::Deployed(identity) => topic_copy::found(&source.session, identity.flow_id).await.map_err(at)?,
        FlowState::Absent | FlowState::Unfinished => Vec::new(),
    };
    let sent = |table: &TableName| copies.iter().any(|copy| copy.ended && copy.table == *table);
    let tables = selected.iter().map(|each| &each.table.table).filter(|table| !sent(table));
    let tables: Vec<String> = tables.map(TableName::sql).collect();
    let sizes = size::estimates(&source.session, &tables).await.map_err(at)?;
    let (copy, most) = (sizes.iter().map(|size| size.bytes).sum::<u64>(), pipeline.topic.retention_bytes);
    if copy > most {
        let so = match &pipeline.topic.kind {
            TopicKind::Kafka(_) => "Kafka drops what the target has not read",
            TopicKind::Embedded | TopicKind::Peer => "at its size the reader waits for ever",
        };
        let what = format!(
            "the copy through the topic has {} of tables, and the topic holds {}: {so}",
            ByteSize(copy),
            ByteSize(most)
        );
        let remedy = format!("[topic] retention = {{ max_bytes = \"{}GiB\" }}, or more", (copy * 2).div_ceil(1 << 30));
        found.warning("[topic]", what, remedy);
    }
    Ok(())
}

/// Creates the topic of a flow where it is missing.
pub(super) async fn install(pipeline: &Pipeline, flow: &FlowName) -> Result<()> {
    let TopicKind::Kafka(kafka) = &pipeline.topic.kind else { return Ok(()) };
    let cluster = Cluster::new(kafka, flow);
    let admin = Admin::open(&cluster)?;
    let standing = admin.standing().await?;
    if standing.topic.is_some() {
        return Ok(());
    }
    let wanted = Wanted::of(&pipeline.topic, standing.brokers);
    let by_hand = || format!("let an administrator of Kafka run `{}`, then deploy again", wanted.create(&cluster));
    let created = admin.create(wanted.replicas, &wanted.settings()).await;
    created.map_err(|fault| if fault.code == Code::MissingRight { fault.remedy(by_hand()) } else { fault })
}

/// Deletes the topic in Kafka with `yes`, else says that it stays. One that lies at this node makes way for that of a later
/// deploy, which would not go on with it.
pub(super) async fn remove(pipeline: &Pipeline, flow: &FlowName, yes: bool) -> Result<Survey> {
    let kafka = match &pipeline.topic.kind {
        TopicKind::Kafka(kafka) => kafka,
        TopicKind::Embedded => return retire(pipeline, flow, &flow.to).await,
        TopicKind::Peer => return retire(pipeline, flow, &flow.from).await,
    };
    let cluster = Cluster::new(kafka, flow);
    let admin = Admin::open(&cluster)?;
    let mut survey = Survey::default();
    if admin.standing().await?.topic.is_none() {
        return Ok(survey);
    }
    let sql = topics_tool(&cluster, "--delete");
    if yes {
        admin.delete().await?;
        let what = format!("delete Kafka topic {}", cluster.topic);
        survey.changes.push(Change { site: flow.from.clone(), what, sql });
    } else {
        let mut found = Findings::at(&flow.from);
        let remedy = "run `sitepair undeploy --yes` to delete it: the next deploy refuses to go on with it";
        found.info(format!("Kafka topic {}", cluster.topic), "stays, with its records", remedy);
        survey.findings = found.into_vec();
    }
    Ok(survey)
}

async fn retire(pipeline: &Pipeline, flow: &FlowName, site: &str) -> Result<Survey> {
    let mut survey = Survey::default();
    if let Aside::Moved(place) = set_aside(&pipeline.topic, flow).await? {
        let mut found = Findings::at(site);
        found.info(format!("topic of {flow}"), format!("lies in {place} now"), "delete it when nobody needs it");
        survey.findings = found.into_vec();
    }
    Ok(survey)
}

/// Records of an earlier flow would be read as this one's, so they are refused before anything is written.
async fn left_over(
    cluster: &Cluster,
    state: Option<&FlowState>,
    subject: &str,
    found: &mut Findings<'_>,
) -> Result<()> {
    let Some(state) = state else { return Ok(()) };
    let mut topic = crate::topic::kafka::Reader::open(cluster)?;
    if topic.bounds().await?.end_lsn.is_none() {
        return Ok(());
    }
    let held = topic.info().await?.flow_id;
    let own = match state {
        FlowState::Deployed(identity) => Some(identity.flow_id),
        FlowState::Absent | FlowState::Unfinished => None,
    };
    if held != own {
        let what = "holds records of another deployment of this flow";
        let delete = topics_tool(cluster, "--delete");
        let remedy = format!("{delete}, or `sitepair resync` if the flow is to begin anew");
        found.blocking(subject, what, remedy);
    }
    Ok(())
}

/// A command of Kafka's own tools for the topic.
fn topics_tool(cluster: &Cluster, options: &str) -> String {
    format!("kafka-topics.sh --bootstrap-server {} --topic {} {options}", cluster.servers(), cluster.topic)
}

/// How the topic should be.
struct Wanted {
    replicas: usize,
    in_sync: usize,
    retention_ms: u128,
    retention_bytes: u64,
}

impl Wanted {
    fn of(topic: &Configured, brokers: usize) -> Self {
        let replicas = brokers.clamp(1, REPLICAS);
        Self {
            replicas,
            in_sync: if replicas < REPLICAS { 1 } else { 2 },
            retention_ms: topic.retention_age.as_millis(),
            retention_bytes: topic.retention_bytes,
        }
    }

    fn settings(&self) -> Vec<(&'static str, String)> {
        vec![
            ("cleanup.policy", "delete".to_owned()),
            ("retention.ms", self.retention_ms.to_string()),
            ("retention.bytes", self.retention_bytes.to_string()),
            ("min.insync.replicas", self.in_sync.to_string()),
            ("unclean.leader.election.enable", "false".to_owned()),
            ("max.message.bytes", MAX_MESSAGE_BYTES.to_string()),
        ]
    }

    /// The command of Kafka's tools that does what [`install`] does.
    fn create(&self, cluster: &Cluster) -> String {
        let options = format!("--create --if-not-exists --partitions 1 --replication-factor {}", self.replicas);
        let mut command = topics_tool(cluster, &options);
        for (setting, value) in self.settings() {
            command.push_str(&format!(" --config {setting}={value}"));
        }
        command
    }

    fn change(&self, cluster: &Cluster, flow: &FlowName) -> Change {
        let what = format!("create Kafka topic {}: 1 partition, {} replicas", cluster.topic, self.replicas);
        Change { site: flow.from.clone(), what, sql: self.create(cluster) }
    }

    /// Each difference that matters, as a finding.
    fn check(&self, topic: &Topic, subject: &str, found: &mut Findings<'_>) {
        if topic.partitions != 1 {
            let what = format!("has {} partitions, and only one keeps the order", topic.partitions);
            found.blocking(subject, what, "delete it; deploy makes it anew");
        }
        if topic.replicas < self.replicas {
            let what = format!("has {} replicas, {} are possible", topic.replicas, self.replicas);
            found.warning(subject, what, "kafka-reassign-partitions.sh");
        }
        let alter = |setting: &str, value: &dyn std::fmt::Display| {
            format!(
                "kafka-configs.sh --alter --topic {} --add-config {setting}={value}",
                subject.trim_start_matches("Kafka topic ")
            )
        };
        let number = |setting: &str| topic.settings.get(setting).and_then(|value| value.parse::<i64>().ok());
        let least = [
            (Severity::Blocking, "max.message.bytes", i64::try_from(RECORD_BYTES), false),
            (Severity::Warning, "min.insync.replicas", i64::try_from(self.in_sync), false),
            (Severity::Warning, "retention.ms", i64::try_from(self.retention_ms), true),
            (Severity::Warning, "retention.bytes", i64::try_from(self.retention_bytes), true),
        ];
        for (severity, setting, wanted, may_be_unlimited) in least {
            let (Some(is), Ok(wanted)) = (number(setting), wanted) else { continue };
            if is < wanted && !(may_be_unlimited && is < 0) {
                found.add(
                    severity,
                    subject,
                    format!("has {setting} = {is}, {wanted} is needed"),
                    alter(setting, &wanted),
                );
            }
        }
        if number("min.insync.replicas").is_some_and(|least| least > topic.replicas as i64) {
            let what = format!("needs more replicas in sync than its {}: nothing can be written", topic.replicas);
            found.blocking(subject, what, alter("min.insync.replicas", &topic.replicas));
        }
        let text = |setting: &str| topic.settings.get(setting).map_or("", String::as_str);
        if !matches!(text("cleanup.policy"), "delete" | "") {
            let what = format!("has cleanup.policy = {}: records would be lost", text("cleanup.policy"));
            found.blocking(subject, what, alter("cleanup.policy", &"delete"));
        }
        if text("unclean.leader.election.enable") == "true" {
            let what = "has unclean.leader.election.enable: acknowledged records may be lost";
            found.warning(subject, what, alter("unclean.leader.election.enable", &"false"));
        }
        if topic.settings.is_empty() {
            let remedy = "grant this user DescribeConfigs on the topic, to have it checked";
            found.info(subject, "its settings may not be read", remedy);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_difference_is_a_finding() {
        let wanted = Wanted { replicas: 3, in_sync: 2, retention_ms: 1000, retention_bytes: 5000 };
        let settings = |changes: &[(&str, &str)]| {
            let all = wanted.settings().into_iter().map(|(name, value)| (name.to_owned(), value));
            let changes = changes.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
            all.chain(changes).collect()
        };
        let right = Topic { partitions: 1, replicas: 3, settings: settings(&[]) };
        let findings = |topic: &Topic| -> Vec<(Severity, String)> {
            let mut found = Findings::at("a");
            wanted.check(topic, "Kafka topic t", &mut found);
            found.into_vec().into_iter().map(|finding| (finding.severity, finding.what)).collect()
        };
        assert_eq!(findings(&right), []);
        let unlimited = settings(&[("retention.ms", "-1"), ("retention.bytes", "-1")]);
        assert_eq!(findings(&Topic { settings: unlimited, ..right.clone() }), []);
        let one = |topic: Topic, severity: Severity, what: &str| {
            let found = findings(&topic);
            assert!(found.len() == 1 && found[0].0 == severity && found[0].1.contains(what), "{found:?}: {what}");
        };
        one(Topic { partitions: 3, ..right.clone() }, Severity::Blocking, "3 partitions");
        one(Topic { replicas: 2, ..right.clone() }, Severity::Warning, "2 replicas");
        one(Topic { settings: Default::default(), ..right.clone() }, Severity::Info, "may not be read");
        for (setting, value, severity) in [
            ("cleanup.policy", "compact", Severity::Blocking),
            ("max.message.bytes", "1000", Severity::Blocking),
            ("min.insync.replicas", "4", Severity::Blocking),
            ("min.insync.replicas", "1", Severity::Warning),
            ("retention.ms", "999", Severity::Warning),
            ("retention.bytes", "10", Severity::Warning),
            ("unclean.leader.election.enable", "true", Severity::Warning),
        ] {
            let changed = Topic { settings: settings(&[(setting, value)]), ..right.clone() };
            let what = if value == "4" { "nothing can be written" } else { setting };
            one(changed, severity, what);
        }
    }
}
