//! Lanes: rules of `[[tables]]` that share a flow of their own, with a schedule of their own.

use std::collections::{BTreeMap, BTreeSet};

use super::pipeline::Rule;
use super::schedule::{self, Schedule};
use super::source::Source;
use crate::model::names::MAX_NAME_BYTES;
use crate::model::{FlowName, Track};

/// The keys of `[schedule]`: a lane of such a name could not have a table there.
const SCHEDULE_KEYS: [&str; 4] = ["mode", "opens", "for", "timezone"];

/// The name of a lane.
pub(super) fn name(source: &mut Source, path: &str) -> Option<String> {
    let name = source.part_name(path)?;
    if SCHEDULE_KEYS.contains(&name.as_str()) {
        let what = format!("a lane can't be called \"{name}\", which is a key of [schedule]");
        source.problem(path, what, "use another name");
        return None;
    }
    Some(name)
}

/// The lanes of all rules; `None` is that of rules without one.
pub(super) fn of(rules: &[Rule]) -> BTreeSet<Option<String>> {
    rules.iter().map(|rule| rule.lane.clone()).collect()
}

/// A flow for each direction and lane. Their names must be names, and no two of them the same.
pub(super) fn flows(source: &mut Source, directions: &[FlowName], lanes: &BTreeSet<Option<String>>) -> Vec<FlowName> {
    let whole = BTreeSet::from([None]);
    // Without a rule the file is refused anyway; what is wrong with the directions is said all the same.
    let lanes = if lanes.is_empty() { &whole } else { lanes };
    let in_lane = |lane: &Option<String>| {
        let lane = lane.clone();
        directions.iter().map(move |flow| FlowName { lane: lane.clone(), ..flow.clone() })
    };
    let flows: Vec<FlowName> = lanes.iter().flat_map(in_lane).collect();
    for (position, flow) in flows.iter().enumerate() {
        let taken = |other: &&FlowName| other.claims().iter().any(|name| flow.claims().contains(name));
        if let Some(other) = flows[..position].iter().find(taken) {
            let what = format!("{} and {} would share a name of {}", long(other), long(flow), flow.origin(Track::Main));
            source.problem("flows", what, "rename a site or a lane");
        }
        let longest = flow.origin(Track::Joining);
        if longest.len() > MAX_NAME_BYTES {
            let what = format!("the name {longest} has more than {MAX_NAME_BYTES} bytes");
            source.problem("flows", what, "shorten the names of the sites, of the lane or of the pipeline");
        }
    }
    flows
}

/// A flow as a reader of the file would name it.
fn long(flow: &FlowName) -> String {
    let lane = flow.lane.as_ref().map_or(String::new(), |lane| format!(" in lane {lane}"));
    format!("flow {} -> {}{lane}", flow.from, flow.to)
}

/// The schedules that lanes have of their own: `[schedule.LANE]`. `lanes` is `None` where not all rules could be read.
pub(super) fn schedules(
    source: &mut Source,
    lanes: Option<&BTreeSet<Option<String>>>,
) -> Option<BTreeMap<String, Schedule>> {
    let mut schedules = Some(BTreeMap::new());
    for lane in source.children("schedule") {
        let at = format!("schedule.{lane}");
        // A value there is refused with the other unknown keys.
        if SCHEDULE_KEYS.contains(&lane.as_str()) || !source.is_table(&at) {
            continue;
        }
        if lanes.is_some_and(|lanes| !lanes.contains(&Some(lane.clone()))) {
            let what = format!("no table has the lane \"{lane}\"");
            source.problem(&at, what, format!("write lane = \"{lane}\" in a [[tables]], or remove this schedule"));
        }
        if source.children(&at).is_empty() {
            source.problem(&at, format!("the schedule of lane \"{lane}\" says nothing"), "give mode, or opens and for");
        }
        let zone = format!("{at}.timezone");
        if source.has("schedule.timezone") && source.has(&format!("{at}.opens")) && !source.has(&zone) {
            let what = format!("[schedule] has a time zone, and that of lane \"{lane}\" is not given");
            source.problem(&at, what, "say it here too: a lane takes over no key of [schedule]");
        }
        match (schedule::schedule(source, &at), &mut schedules) {
            (Some(schedule), Some(all)) => drop(all.insert(lane, schedule)),
            _ => schedules = None,
        }
    }
    schedules
}
