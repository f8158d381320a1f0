//! docs/BENCHMARKS.md and its plot.

use std::fmt::Write as _;

use crate::contest::{Contestant, Run};
use crate::latency::Latency;
use crate::stage::{Build, Topic};

/// All runs of one contestant in one workload.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct Entry {
    pub version: String,
    pub workload: String,
    pub title: String,
    pub rows: u64,
    pub contestant: Contestant,
    pub runs: Vec<Run>,
}

impl Entry {
    fn sorted(&self) -> Vec<f64> {
        let mut seconds: Vec<f64> = self.runs.iter().map(|run| run.seconds).collect();
        seconds.sort_by(f64::total_cmp);
        seconds
    }

    /// Median seconds.
    pub fn median(&self) -> f64 {
        let seconds = self.sorted();
        seconds[seconds.len() / 2]
    }

    fn rate(&self) -> f64 {
        self.rows as f64 / self.median()
    }

    /// The run whose time is the median.
    fn typical(&self) -> &Run {
        let mut runs: Vec<&Run> = self.runs.iter().collect();
        runs.sort_by(|one, other| one.seconds.total_cmp(&other.seconds));
        runs[runs.len() / 2]
    }

    fn cpu(&self, kind: &str) -> f64 {
        self.typical().usage.by_kind.get(kind).map_or(0.0, |used| used.cpu_s())
    }
}

fn find<'a>(entries: &'a [Entry], of: &Entry, contestant: Contestant) -> Option<&'a Entry> {
    let same = |entry: &&Entry| {
        (&entry.version, &entry.workload) == (&of.version, &of.workload) && entry.contestant == contestant
    };
    entries.iter().find(same)
}

fn ratio(entries: &[Entry], of: &Entry, to: Contestant) -> String {
    let counts = |entry: &&Entry| entry.runs.iter().all(|run| run.equal);
    let to = find(entries, of, to).filter(counts).filter(|_| counts(&of));
    to.map_or(String::new(), |to| format!("{:.2}", to.median() / of.median()))
}

/// Workloads in the order they were played.
fn scenes(entries: &[Entry]) -> Vec<&Entry> {
    let mut scenes: Vec<&Entry> = Vec::new();
    for entry in entries {
        if !scenes.iter().any(|one| (&one.version, &one.workload) == (&entry.version, &entry.workload)) {
            scenes.push(entry);
        }
    }
    scenes
}

/// One ratio of medians: whose, and to whose.
type Ratio = (&'static str, Contestant, Contestant);

const EMBEDDED: Contestant = Contestant::Sitepair(Build::This, Topic::Embedded);
const KAFKA: Contestant = Contestant::Sitepair(Build::This, Topic::Kafka);

/// The tables of the throughput part.
pub fn throughput(entries: &[Entry]) -> String {
    let relaxed = Contestant::Sitepair(Build::This, Topic::Relaxed);
    tables(
        entries,
        &[
            ("reader / pg_recvlogical", Contestant::Reader(Build::This), Contestant::Recvlogical),
            ("slot to target / native", EMBEDDED, Contestant::Native),
            ("the same, both synchronous_commit off", relaxed, Contestant::Native),
            ("slot to target / pg_recvlogical", EMBEDDED, Contestant::Recvlogical),
            ("replay / native", Contestant::Replay(Build::This), Contestant::Native),
        ],
    )
}

/// The tables of the part with brokers.
pub fn brokers(entries: &[Entry]) -> String {
    tables(
        entries,
        &[
            ("slot to target by Kafka / Debezium", KAFKA, Contestant::Debezium),
            ("slot to target, embedded topic / Debezium", EMBEDDED, Contestant::Debezium),
            ("slot to target by Kafka / native", KAFKA, Contestant::Native),
        ],
    )
}

fn tables(entries: &[Entry], ratios: &[Ratio]) -> String {
    let mut out = String::new();
    let _ = writeln!(out, "### Ratios of medians: above 1 is faster than the other\n");
    let titles: Vec<_> = ratios.iter().map(|(title, ..)| *title).collect();
    let _ = writeln!(out, "| server | workload | {} |\n|---|---|{}", titles.join(" | "), "---|".repeat(ratios.len()));
    for scene in scenes(entries) {
        let of =
            |(_, one, to): &Ratio| find(entries, scene, *one).map_or(String::new(), |one| ratio(entries, one, *to));
        let values: Vec<_> = ratios.iter().map(of).collect();
        let _ = writeln!(out, "| {} | {} | {} |", scene.version, scene.workload, values.join(" | "));
    }
    for scene in scenes(entries) {
        let _ = writeln!(out, "\n### PostgreSQL {}: {}\n", scene.version, scene.title);
        let _ = writeln!(
            out,
            "| | s (min to max) | rows/s | × pg_recvlogical | × native | CPU s: source | client | target | client peak MB | client wrote MB | target WAL MB | loopback MB |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
        );
        for entry in entries.iter().filter(|one| (&one.version, &one.workload) == (&scene.version, &scene.workload)) {
            out.push_str(&line(entries, entry));
        }
        out.push_str(&beside(entries, scene));
    }
    out
}

/// What the broker took, and what of Debezium's runs is not in its line.
fn beside(entries: &[Entry], scene: &Entry) -> String {
    let mut out = String::new();
    for contestant in [KAFKA, Contestant::Debezium] {
        let Some(entry) = find(entries, scene, contestant) else { continue };
        let run = entry.typical();
        let broker = run.usage.by_kind.get("broker").cloned().unwrap_or_default();
        let _ = write!(
            out,
            "\n{}: the broker took {:.2} CPU s, at most {:.0} MB, and wrote {:.0} MB.",
            entry.contestant.title(),
            broker.cpu_s(),
            broker.peak_bytes as f64 / 1e6,
            broker.written_bytes as f64 / 1e6
        );
        if run.start_s > 0.0 {
            let _ = write!(out, " Its JVM took {:.1} s to the start of its task, which are not counted.", run.start_s);
        }
        if !entry.runs.iter().all(|run| run.equal) {
            out.push_str(" **Its target differs from the source: the time does not count.**");
        }
        out.push('\n');
    }
    out
}

fn line(entries: &[Entry], entry: &Entry) -> String {
    let (seconds, run) = (entry.sorted(), entry.typical());
    let client = run.usage.by_kind.get("client").cloned().unwrap_or_default();
    let mb = |bytes: u64| format!("{:.0}", bytes as f64 / 1e6);
    format!(
        "| {} | {:.2} ({:.2} to {:.2}) | {:.0} | {} | {} | {:.2} | {:.2} | {:.2} | {} | {} | {} | {} |\n",
        entry.contestant.title(),
        entry.median(),
        seconds[0],
        seconds[seconds.len() - 1],
        entry.rate(),
        ratio(entries, entry, Contestant::Recvlogical),
        ratio(entries, entry, Contestant::Native),
        entry.cpu("source, sessions"),
        entry.cpu("client"),
        entry.cpu("target, apply") + entry.cpu("target, other"),
        mb(client.peak_bytes),
        mb(client.written_bytes),
        mb(run.target_wal_bytes),
        mb(run.usage.loopback_bytes),
    )
}

/// The table of the latency part.
pub fn latency(all: &[Latency]) -> String {
    let mut out = String::from(
        "| server | load | carried by | arrived | p50 ms | p95 ms | p99 ms | max ms |\n|---|---|---|---|---|---|---|---|\n",
    );
    for one in all {
        let _ = writeln!(
            out,
            "| {} | {} tx/s for {} s | {} | {} | {:.1} | {:.1} | {:.1} | {:.1} |",
            one.version,
            one.rate,
            one.seconds,
            one.contestant.title(),
            one.count,
            one.p50_ms,
            one.p95_ms,
            one.p99_ms,
            one.max_ms
        );
    }
    out
}

const BAR: f64 = 11.0;
const LEFT: f64 = 190.0;
const WIDTH: f64 = 560.0;
const COLOURS: [(Contestant, &str); 5] = [
    (Contestant::Recvlogical, "#9aa5b1"),
    (Contestant::Native, "#52606d"),
    (Contestant::Reader(Build::This), "#7cc4fa"),
    (EMBEDDED, "#127fbf"),
    (Contestant::Replay(Build::This), "#f0b429"),
];

/// Rows per second, by workload, relative to native replication.
pub fn plot(entries: &[Entry]) -> String {
    let scenes = scenes(entries);
    let most = 4.0;
    let height = 76.0 + scenes.len() as f64 * (BAR * COLOURS.len() as f64 + 14.0);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{:.0}\" height=\"{height:.0}\" font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
        LEFT + WIDTH + 70.0
    );
    for (at, (contestant, colour)) in COLOURS.iter().enumerate() {
        let (x, y) = (10.0 + (at % 4) as f64 * 200.0, 8.0 + (at / 4) as f64 * 16.0);
        let _ = writeln!(
            out,
            "<rect x=\"{x}\" y=\"{y}\" width=\"10\" height=\"10\" fill=\"{colour}\"/><text x=\"{}\" y=\"{}\">{}</text>",
            x + 14.0,
            y + 9.0,
            contestant.title()
        );
    }
    let _ = writeln!(out, "<text x=\"10\" y=\"52\">speed relative to native logical replication (1 = the line)</text>");
    let mut y = 62.0;
    for scene in scenes {
        let Some(native) = find(entries, scene, Contestant::Native) else { continue };
        let _ = writeln!(
            out,
            "<text x=\"10\" y=\"{:.0}\">PostgreSQL {}, {}</text>",
            y + BAR * 2.8,
            scene.version,
            scene.workload
        );
        for (contestant, colour) in COLOURS {
            if let Some(entry) = find(entries, scene, contestant) {
                let times = native.median() / entry.median();
                let width = WIDTH * times.min(most) / most;
                let _ = writeln!(
                    out,
                    "<rect x=\"{LEFT}\" y=\"{y:.0}\" width=\"{width:.0}\" height=\"{}\" fill=\"{colour}\"/><text x=\"{:.0}\" y=\"{:.0}\">{times:.2}</text>",
                    BAR - 1.0,
                    LEFT + width + 4.0,
                    y + BAR - 2.0
                );
            }
            y += BAR;
        }
        y += 14.0;
    }
    let x = LEFT + WIDTH / most;
    let _ = writeln!(out, "<line x1=\"{x}\" y1=\"58\" x2=\"{x}\" y2=\"{y:.0}\" stroke=\"#cf1124\"/>\n</svg>");
    out
}
