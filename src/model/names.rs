//! Names of tables, flows and what a flow installs, and their quoting.

use std::collections::BTreeMap;
use std::{fmt, iter};

/// A table's schema and name, unquoted, as the catalog has them.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct TableName {
    /// Schema.
    pub schema: String,
    /// Name within the schema.
    pub name: String,
}

impl TableName {
    /// From its two parts.
    pub fn new(schema: impl Into<String>, name: impl Into<String>) -> Self {
        Self { schema: schema.into(), name: name.into() }
    }

    /// `"schema"."name"`, safe inside SQL.
    pub fn sql(&self) -> String {
        format!("{}.{}", quote_ident(&self.schema), quote_ident(&self.name))
    }
}

/// `schema.name` for messages and for matching globs; not for SQL.
impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.schema, self.name)
    }
}

/// Quotes an identifier: always in double quotes, inner ones doubled (PostgreSQL manual, section 4.1.1).
pub fn quote_ident(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Quotes a string constant, standard_conforming_strings on or off (PostgreSQL manual, section 4.1.2).
pub fn quote_literal(text: &str) -> String {
    let doubled = text.replace('\'', "''");
    if doubled.contains('\\') { format!(" E'{}'", doubled.replace('\\', "\\\\")) } else { format!("'{doubled}'") }
}

/// Longest name PostgreSQL keeps whole (NAMEDATALEN - 1).
pub const MAX_NAME_BYTES: usize = 63;

/// Names one direction of a pipeline, `<pipeline>_[<lane>_]<from>_<to>`; parts match `[a-z][a-z0-9_]{0,14}`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlowName {
    /// The pipeline's name.
    pub pipeline: String,
    /// The lane, for tables with a schedule of their own.
    pub lane: Option<String>,
    /// Site that changes come from.
    pub from: String,
    /// Site that they go to; empty in the name of a log that several flows share.
    pub to: String,
    /// Slot, publication and topic are those of all flows that leave the site ([`FlowName::log`]).
    pub shared: bool,
}

/// One of the places in its topic that a flow has at its target, each with a checkpoint of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Track {
    /// The flow itself: all joined tables.
    Main,
    /// Tables that were copied or paused and catch up with the main track.
    Joining,
    /// A range that is applied again.
    Replay,
}

impl Track {
    /// The name in `sitepair.checkpoint` and `sitepair.journal`.
    pub fn name(self) -> &'static str {
        match self {
            Track::Main => "main",
            Track::Joining => "joining",
            Track::Replay => "replay",
        }
    }
}

impl FlowName {
    /// Names what is read once for all who share it, the reader with its slot, publication and topic: the flow itself, or
    /// `<pipeline>_[<lane>_]<from>`.
    pub fn log(&self) -> FlowName {
        if self.shared { FlowName { to: String::new(), ..self.clone() } } else { self.clone() }
    }

    /// The name of slot, publication and topic in Kafka: `sitepair_<log>`.
    pub fn object(&self) -> String {
        format!("sitepair_{}", self.log())
    }

    /// The replication origin under which a track applies. A session has one, and no two sessions share one (A5); joining
    /// and replay never run together.
    pub fn origin(&self, track: Track) -> String {
        match track {
            Track::Main => format!("sitepair_{self}"),
            Track::Joining | Track::Replay => format!("sitepair_{self}_side"),
        }
    }

    /// All origins that `deploy` makes for the flow.
    pub fn origins(&self) -> [String; 2] {
        [self.origin(Track::Main), self.origin(Track::Joining)]
    }

    /// The names that no other flow may have: its origins at the target; slot, publication and topic, unless it shares
    /// them.
    pub fn claims(&self) -> Vec<String> {
        let mut claims = Vec::from(self.origins());
        if !self.shared {
            claims.push(self.object());
        }
        claims
    }

    /// The origins under which this pipeline's changes arrive at the site that this flow leaves, each with the site that it
    /// comes from, in whichever of the `lanes` or in none; the reader drops their transactions (O1). Whole names, since a
    /// prefix would also take in the origins of a pipeline whose name begins like this one's.
    pub fn own_origins<'s>(
        &self,
        sites: impl IntoIterator<Item = &'s str>,
        lanes: impl IntoIterator<Item = &'s str>,
    ) -> BTreeMap<String, String> {
        let lanes: Vec<Option<String>> =
            iter::once(None).chain(lanes.into_iter().map(|lane| Some(lane.to_owned()))).collect();
        let mut origins = BTreeMap::new();
        for site in sites.into_iter().filter(|site| *site != self.from) {
            for lane in lanes.clone() {
                let arriving = FlowName { lane, from: site.to_owned(), to: self.from.clone(), ..self.clone() };
                origins.extend(arriving.origins().map(|origin| (origin, site.to_owned())));
            }
        }
        origins
    }
}

impl fmt::Display for FlowName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}_", self.pipeline)?;
        if let Some(lane) = &self.lane {
            write!(f, "{lane}_")?;
        }
        f.write_str(&self.from)?;
        if self.to.is_empty() { Ok(()) } else { write!(f, "_{}", self.to) }
    }
}

/// True for what may name a pipeline, a lane or a site: `[a-z][a-z0-9_]{0,14}`.
pub fn is_part_name(text: &str) -> bool {
    let mut bytes = text.bytes();
    text.len() <= 15
        && bytes.next().is_some_and(|b| b.is_ascii_lowercase())
        && bytes.all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoting_survives_hostile_names() {
        assert_eq!(quote_ident("a\"b"), "\"a\"\"b\"");
        assert_eq!(quote_literal("o'hara"), "'o''hara'");
        assert_eq!(quote_literal("a\\'b"), " E'a\\\\''b'");
        assert_eq!(TableName::new("öffentlich", "x.y").sql(), "\"öffentlich\".\"x.y\"");
    }

    #[test]
    fn part_names_are_bounded() {
        for (text, ok) in [
            ("mssp", true),
            ("a", true),
            ("a_1", true),
            ("", false),
            ("1a", false),
            ("Ab", false),
            ("a-b", false),
            ("abcdefghijklmno", true),
            ("abcdefghijklmnop", false),
        ] {
            assert_eq!(is_part_name(text), ok, "{text:?}");
        }
    }

    #[test]
    fn a_flow_names_its_objects() {
        let flow =
            FlowName { pipeline: "mssp".into(), lane: None, from: "helsinki".into(), to: "oulu".into(), shared: false };
        assert_eq!(flow.object(), "sitepair_mssp_helsinki_oulu");
        let origins = flow.own_origins(["helsinki", "oulu", "turku"], []);
        let expected = [
            ("sitepair_mssp_oulu_helsinki", "oulu"),
            ("sitepair_mssp_oulu_helsinki_side", "oulu"),
            ("sitepair_mssp_turku_helsinki", "turku"),
            ("sitepair_mssp_turku_helsinki_side", "turku"),
        ];
        assert!(origins.iter().map(|(name, site)| (name.as_str(), site.as_str())).eq(expected), "{origins:?}");
        let lane = FlowName { lane: Some("night".into()), ..flow };
        // Whatever the reader's own lane is, what any lane brings is not sent back.
        let origins = lane.own_origins(["helsinki", "oulu"], ["day", "night"]);
        let expected = ["sitepair_mssp_day_oulu_helsinki", "sitepair_mssp_day_oulu_helsinki_side"].into_iter();
        let expected = expected.chain(["sitepair_mssp_night_oulu_helsinki", "sitepair_mssp_night_oulu_helsinki_side"]);
        let expected = expected.chain(["sitepair_mssp_oulu_helsinki", "sitepair_mssp_oulu_helsinki_side"]);
        assert!(origins.keys().map(String::as_str).eq(expected), "{origins:?}");
        assert_eq!(lane.to_string(), "mssp_night_helsinki_oulu");
        let shared = FlowName { shared: true, ..lane };
        let names = [shared.to_string(), shared.log().to_string(), shared.object(), shared.origin(Track::Main)];
        let expected = [
            "mssp_night_helsinki_oulu",
            "mssp_night_helsinki",
            "sitepair_mssp_night_helsinki",
            "sitepair_mssp_night_helsinki_oulu",
        ];
        assert_eq!(names, expected);
    }
}
