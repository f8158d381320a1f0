//! What a flow's conductor does next, as a function of what there is: pure, and a table in its tests.
//!
//! ```text
//! look ──> due: an act between two groups ──> done with everything stopped ──> look again
//!     └──> nothing due: works run (main applier, copier, joining applier) until something is due or the works change
//! ```

use std::collections::{BTreeMap, BTreeSet};

use crate::applier::CopiesBegin;
use crate::model::{Lsn, Offset, TableName};
use crate::ports::Goal;
use crate::postgres::table_state::State;

/// A place of a track.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) next: Offset,
    pub(super) end_lsn: Lsn,
    pub(super) horizon: Lsn,
}

/// What there is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct View {
    /// The main track; `None` before the topic was adopted.
    pub(super) main: Option<Place>,
    /// The joining track, while there is one.
    pub(super) joining: Option<Place>,
    /// Tables that have a row at the target.
    pub(super) tables: BTreeMap<TableName, State>,
    /// Paused tables whose definition has changed since.
    pub(super) mended: BTreeSet<TableName>,
    /// Tables to copy that do not fit at the target, and have not changed since that was found.
    pub(super) stuck: BTreeSet<TableName>,
    /// Tables that the rules select and the publication has; `None` while the source does not say.
    pub(super) members: Option<BTreeSet<TableName>>,
    /// Of them, those that entered the publication and were not taken up since.
    pub(super) entered: BTreeSet<TableName>,
    /// Tables that are to be copied, or wait for a column, and that no rule of this node's file names.
    pub(super) unnamed: BTreeSet<TableName>,
    /// A command waits for an answer.
    pub(super) asked: bool,
    /// The main track is at the topic's end.
    pub(super) caught_up: bool,
    /// Copies travel through the topic, which then says what belongs to the flow.
    pub(super) through_topic: bool,
    /// Copies begin where the main track is.
    pub(super) copies: Option<CopiesBegin>,
    /// The joining track is so near to the main one that the rest is a matter of a moment.
    pub(super) near: bool,
}

/// An act between two groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Act {
    /// Make the first checkpoint: from the topic's genesis record, or at the end of a topic that targets share.
    Adopt,
    /// Answer the command.
    Answer,
    /// Drop what is kept of tables that left the flow.
    Forget(Vec<TableName>),
    /// Copy tables that left the flow and came back: what happened between is nowhere.
    Again(Vec<TableName>),
    /// Copy tables that are new.
    Register(Vec<TableName>),
    /// Set tables to copying whose copy begins in the topic (H5).
    Copies(CopiesBegin),
    /// Take up tables that are copied or mended.
    BeginJoining,
    /// Bring both tracks to one place and make them one.
    Join,
    /// Drop a joining track that has no table any more.
    EndJoining,
}

/// What runs while nothing is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Works {
    pub(super) main: bool,
    pub(super) copier: bool,
    pub(super) joining: bool,
}

impl View {
    fn any(&self, state: State) -> bool {
        self.tables.values().any(|other| *other == state)
    }

    /// True while all there is to do is copying: then the log waits, and the tables join all at once where it begins. Those
    /// that do not fit keep nobody waiting.
    fn copies_only(&self) -> bool {
        !self.through_topic
            && self.tables.iter().any(|(table, state)| self.is_under_way(table, *state))
            && !self.any(State::Joined)
    }

    fn is_under_way(&self, table: &TableName, state: State) -> bool {
        state == State::Copying && self.is_member(table) && !self.stuck.contains(table)
    }

    fn is_member(&self, table: &TableName) -> bool {
        self.members.as_ref().is_none_or(|members| members.contains(table))
    }
}

/// The act that is due, if one is.
pub(super) fn due(view: &View) -> Option<Act> {
    if view.main.is_none() {
        return Some(Act::Adopt);
    }
    if view.asked {
        return Some(Act::Answer);
    }
    if let Some(copies) = &view.copies {
        return Some(Act::Copies(copies.clone()));
    }
    if let Some(members) = &view.members {
        let known = |table: &&TableName| view.tables.contains_key(*table);
        let again: Vec<_> = view.entered.iter().filter(known).cloned().collect();
        if !again.is_empty() {
            return Some(Act::Again(again));
        }
        let new: Vec<_> = members.iter().filter(|table| !known(table)).cloned().collect();
        if !new.is_empty() {
            return Some(Act::Register(new));
        }
        // Until the log is applied, changes of a table that left may lie ahead.
        let gone: Vec<_> = view.tables.keys().filter(|table| !members.contains(*table)).cloned().collect();
        if !gone.is_empty() && view.caught_up {
            return Some(Act::Forget(gone));
        }
    }
    // Nobody will send the rest of such a copy, and the topic would keep for ever what the table waits for.
    if view.members.is_none() && view.through_topic && view.caught_up && !view.unnamed.is_empty() {
        return Some(Act::Forget(view.unnamed.iter().cloned().collect()));
    }
    match (view.joining.is_some(), view.any(State::Joining)) {
        (true, false) => return Some(Act::EndJoining),
        (true, true) if view.near || view.joining.map(|at| at.next) == view.main.map(|at| at.next) => {
            return Some(Act::Join);
        }
        (true, true) => return None,
        (false, _) => {}
    }
    let ready = view.any(State::Copied) && !view.copies_only();
    let mended = view.mended.iter().any(|table| view.tables.get(table) == Some(&State::Paused));
    (ready || mended || view.any(State::Joining)).then_some(Act::BeginJoining)
}

/// What runs while nothing is due.
pub(super) fn works(view: &View) -> Works {
    let named = view.members.is_some() || view.through_topic;
    let copier = named && view.tables.iter().any(|(table, state)| *state == State::Copying && view.is_member(table));
    Works {
        main: view.main.is_some() && !view.copies_only(),
        copier,
        joining: view.joining.is_some() && view.any(State::Joining),
    }
}

/// Whether a run has come to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Reached {
    /// Not yet; the main applier goes as far as this meanwhile.
    Not(Goal),
    /// Everything is there.
    Whole,
    /// Everything but tables that wait for somebody to mend them.
    But(Vec<TableName>),
}

/// Has the run come to its end? A copy belongs to what was there at the start, and so does what makes it consistent.
pub(super) fn reached(view: &View, goal: Goal) -> Reached {
    let (Some(main), false) = (view.main, goal == Goal::Never) else { return Reached::Not(Goal::Never) };
    let far = match goal {
        Goal::Never => false,
        Goal::Lsn(lsn) => main.end_lsn >= lsn.max(main.horizon),
        // Nobody may be there to read on, so the horizon may be out of reach.
        Goal::Offset(offset) => main.next >= offset,
    };
    if !far {
        return Reached::Not(match goal {
            Goal::Lsn(lsn) => Goal::Lsn(lsn.max(main.horizon)),
            Goal::Never | Goal::Offset(_) => goal,
        });
    }
    let under_way = view.tables.iter().any(|(table, state)| match state {
        State::Copying => view.is_under_way(table, *state),
        State::Copied | State::Joining => true,
        State::Paused | State::Joined => false,
    });
    let new = view.members.iter().flatten().any(|table| !view.tables.contains_key(table));
    // A flow without a table has not begun: only the source knows what is to be copied.
    let asks = matches!(goal, Goal::Lsn(_)) && !view.through_topic;
    let unknown = view.members.is_none() && (asks || view.tables.is_empty());
    let waits = |(table, state): &(&TableName, &State)| **state == State::Paused || view.stuck.contains(*table);
    let paused: Vec<TableName> = view.tables.iter().filter(waits).map(|(table, _)| table.clone()).collect();
    match (under_way || new || unknown || view.joining.is_some(), paused.is_empty()) {
        (true, _) => Reached::Not(Goal::Never),
        (false, true) => Reached::Whole,
        (false, false) => Reached::But(paused),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use State::{Copied, Copying, Joined, Joining, Paused};

    fn table(name: &str) -> TableName {
        TableName::new("s", name)
    }

    fn names(names: &str) -> Vec<TableName> {
        names.split_whitespace().map(table).collect()
    }

    fn place(next: u64) -> Place {
        Place { next: Offset(next), end_lsn: Lsn(next * 10), horizon: Lsn(0) }
    }

    /// `tables` by name; members are `members`.
    fn view(tables: &[(&str, State)], members: &str) -> View {
        View {
            main: Some(place(5)),
            tables: tables.iter().map(|(name, state)| (table(name), *state)).collect(),
            members: Some(names(members).into_iter().collect()),
            caught_up: true,
            ..View::default()
        }
    }

    fn beginning() -> CopiesBegin {
        CopiesBegin { at: Offset(5), tables: vec![(table("a"), uuid::Uuid::from_u128(1))] }
    }

    fn begins(view: View) -> View {
        View { copies: Some(beginning()), ..view }
    }

    /// Copies travel through the topic, and the source's node is out of reach.
    fn through(tables: &[(&str, State)]) -> View {
        View { members: None, through_topic: true, ..view(tables, "") }
    }

    /// The file does not name table b.
    fn leaves(view: View) -> View {
        View { unnamed: names("b").into_iter().collect(), ..view }
    }

    fn works_of(main: bool, copier: bool, joining: bool) -> Works {
        Works { main, copier, joining }
    }

    #[test]
    fn what_is_due() {
        let joining = |tables: &[(&str, State)], next: u64| View { joining: Some(place(next)), ..view(tables, "a b") };
        let cases: Vec<(&str, View, Option<Act>)> = vec![
            ("nothing yet", View { main: None, ..view(&[], "a b") }, Some(Act::Adopt)),
            ("first start", view(&[], "a b"), Some(Act::Register(names("a b")))),
            ("killed while registering", view(&[("a", Copying)], "a b"), Some(Act::Register(names("b")))),
            ("the source does not answer", View { members: None, ..view(&[], "") }, None),
            ("initial copy", view(&[("a", Copying), ("b", Copying)], "a b"), None),
            ("initial copy, one done", view(&[("a", Copying), ("b", Copied)], "a b"), None),
            (
                "initial copy, one does not fit",
                View { stuck: names("a").into_iter().collect(), ..view(&[("a", Copying), ("b", Copied)], "a b") },
                Some(Act::BeginJoining),
            ),
            ("initial copy done", view(&[("a", Copied), ("b", Copied)], "a b"), Some(Act::BeginJoining)),
            ("killed after the begin", joining(&[("a", Joining), ("b", Joining)], 5), Some(Act::Join)),
            ("catching up", joining(&[("a", Joining), ("b", Joined)], 3), None),
            ("near", View { near: true, ..joining(&[("a", Joining), ("b", Joined)], 3) }, Some(Act::Join)),
            ("main went back", joining(&[("a", Joining), ("b", Joined)], 7), None),
            ("all at one place", view(&[("a", Joined), ("b", Joined)], "a b"), None),
            ("a new table", view(&[("a", Joined)], "a b"), Some(Act::Register(names("b")))),
            ("the new table is copied", view(&[("a", Joined), ("b", Copied)], "a b"), Some(Act::BeginJoining)),
            ("one more while one joins", joining(&[("a", Joining), ("b", Copied)], 3), None),
            ("a table left", view(&[("a", Joined), ("b", Joined)], "a"), Some(Act::Forget(names("b")))),
            ("a table left, log ahead", View { caught_up: false, ..view(&[("a", Joined), ("b", Joined)], "a") }, None),
            (
                "a table came back",
                View { entered: names("b").into_iter().collect(), ..view(&[("a", Joined), ("b", Joined)], "a b") },
                Some(Act::Again(names("b"))),
            ),
            (
                "a table entered",
                View { entered: names("b").into_iter().collect(), ..view(&[("a", Joined)], "a b") },
                Some(Act::Register(names("b"))),
            ),
            ("does not fit", view(&[("a", Joined), ("b", Paused)], "a b"), None),
            (
                "mended",
                View { mended: names("b").into_iter().collect(), ..view(&[("a", Joined), ("b", Paused)], "a b") },
                Some(Act::BeginJoining),
            ),
            ("does not fit while joining", joining(&[("a", Joined), ("b", Paused)], 3), Some(Act::EndJoining)),
            ("asked", View { asked: true, ..view(&[("a", Joined)], "a") }, Some(Act::Answer)),
            ("a copy begins", begins(view(&[("a", Joined)], "a")), Some(Act::Copies(beginning()))),
            (
                "a copy begins while one joins",
                begins(joining(&[("a", Joining), ("b", Joined)], 3)),
                Some(Act::Copies(beginning())),
            ),
            (
                "asked when a copy begins",
                View { asked: true, ..begins(view(&[("a", Joined)], "a")) },
                Some(Act::Answer),
            ),
            ("through the topic, one is copied", through(&[("a", Copied), ("b", Copying)]), Some(Act::BeginJoining)),
            ("through the topic, none is copied", through(&[("a", Copying)]), None),
            ("asked before anything", View { asked: true, main: None, ..view(&[], "a") }, Some(Act::Adopt)),
        ];
        for (name, view, expected) in cases {
            assert_eq!(due(&view), expected, "{name}");
        }
    }

    #[test]
    fn what_leaves_the_file_is_forgotten_where_the_source_does_not_say() {
        let cases = [
            (
                "through the topic, one left the file",
                leaves(through(&[("a", Joined), ("b", Copying)])),
                Some(Act::Forget(names("b"))),
            ),
            (
                "through the topic, one left the file, log ahead",
                View { caught_up: false, ..leaves(through(&[("a", Joined), ("b", Copying)])) },
                None,
            ),
            (
                "the source does not answer, one left",
                leaves(View { members: None, ..view(&[("b", Copying)], "") }),
                None,
            ),
            (
                "the source says that it is there",
                leaves(View { through_topic: true, ..view(&[("b", Copying)], "b") }),
                None,
            ),
        ];
        for (name, view, expected) in cases {
            assert_eq!(due(&view), expected, "{name}");
        }
    }

    #[test]
    fn what_runs() {
        let cases: Vec<(&str, View, Works)> = vec![
            ("nothing yet", View { main: None, ..view(&[], "") }, works_of(false, false, false)),
            ("initial copy", view(&[("a", Copying), ("b", Copied)], "a b"), works_of(false, true, false)),
            ("all at one place", view(&[("a", Joined), ("b", Joined)], "a b"), works_of(true, false, false)),
            ("one is copied", view(&[("a", Joined), ("b", Copying)], "a b"), works_of(true, true, false)),
            (
                "one is copied, one joins",
                View { joining: Some(place(2)), ..view(&[("a", Joined), ("b", Copying), ("c", Joining)], "a b c") },
                works_of(true, true, true),
            ),
            ("all paused", view(&[("a", Paused)], "a"), works_of(true, false, false)),
            ("a table to copy has left", view(&[("a", Joined), ("b", Copying)], "a"), works_of(true, false, false)),
            (
                "the source does not answer",
                View { members: None, ..view(&[("a", Joined), ("b", Copying)], "") },
                works_of(true, false, false),
            ),
            ("no table", view(&[], ""), works_of(true, false, false)),
            ("through the topic", through(&[("a", Copying)]), works_of(true, true, false)),
            ("through the topic, none to copy", through(&[("a", Joined)]), works_of(true, false, false)),
        ];
        for (name, view, expected) in cases {
            assert_eq!(works(&view), expected, "{name}");
        }
    }

    #[test]
    fn when_it_is_done() {
        let goal = Goal::Lsn(Lsn(50));
        let horizon = |mut view: View, lsn: u64| {
            view.main = view.main.map(|main| Place { horizon: Lsn(lsn), ..main });
            view
        };
        let whole = view(&[("a", Joined)], "a");
        let cases: Vec<(&str, View, Goal, Reached)> = vec![
            ("a daemon", whole.clone(), Goal::Never, Reached::Not(Goal::Never)),
            ("nothing yet", View { main: None, ..whole.clone() }, goal, Reached::Not(Goal::Never)),
            ("there", whole.clone(), goal, Reached::Whole),
            ("before", whole.clone(), Goal::Lsn(Lsn(51)), Reached::Not(Goal::Lsn(Lsn(51)))),
            ("not consistent yet", horizon(whole.clone(), 60), goal, Reached::Not(Goal::Lsn(Lsn(60)))),
            ("by offset", horizon(whole.clone(), 60), Goal::Offset(Offset(5)), Reached::Whole),
            (
                "by offset, nothing known",
                View { members: None, ..view(&[], "") },
                Goal::Offset(Offset(5)),
                Reached::Not(Goal::Never),
            ),
            (
                "by offset, the source away",
                View { members: None, ..whole.clone() },
                Goal::Offset(Offset(5)),
                Reached::Whole,
            ),
            ("by offset, before", whole.clone(), Goal::Offset(Offset(6)), Reached::Not(Goal::Offset(Offset(6)))),
            ("copying", view(&[("a", Copying)], "a"), goal, Reached::Not(Goal::Never)),
            ("not registered", view(&[("a", Joined)], "a b"), goal, Reached::Not(Goal::Never)),
            ("the source does not answer", View { members: None, ..whole.clone() }, goal, Reached::Not(Goal::Never)),
            ("does not fit", view(&[("a", Joined), ("b", Paused)], "a b"), goal, Reached::But(names("b"))),
            (
                "can't be copied",
                View { stuck: names("b").into_iter().collect(), ..view(&[("a", Joined), ("b", Copying)], "a b") },
                goal,
                Reached::But(names("b")),
            ),
            ("through the topic, nothing known", through(&[]), goal, Reached::Not(Goal::Never)),
            ("through the topic", through(&[("a", Copying)]), goal, Reached::Not(Goal::Never)),
            ("through the topic, done", through(&[("a", Joined)]), goal, Reached::Whole),
            ("one left", view(&[("a", Joined), ("b", Copying)], "a"), goal, Reached::Whole),
        ];
        for (name, view, goal, expected) in cases {
            assert_eq!(reached(&view, goal), expected, "{name}");
        }
    }
}
