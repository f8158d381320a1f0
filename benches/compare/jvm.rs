//! Java programs: Kafka's broker and Kafka Connect.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Longest start.
const START_WITHIN: Duration = Duration::from_secs(180);

/// What all of them log: a line an event, on standard output.
const LOGGING: &str = "status = warn\nappender.console.type = Console\nappender.console.name = OUT\n\
    appender.console.layout.type = PatternLayout\nappender.console.layout.pattern = [%d] %p %m (%c)%n\n\
    rootLogger.level = info\nrootLogger.appenderRef.out.ref = OUT\n";

/// A running one, gone with the process that made it, however that process ends.
pub struct Jvm {
    child: Child,
    reaper: Child,
    log: PathBuf,
}

/// `java` with these jars; it logs into `dir`.
pub fn java(dir: &Path, options: &[&str], jars: &[PathBuf]) -> Command {
    let logging = dir.join("log4j2.properties");
    fs::write(&logging, LOGGING).expect("writable");
    let jars: Vec<String> = jars.iter().map(|jar| jar.display().to_string()).collect();
    let mut command = Command::new("java");
    command.args(options).arg("-Djava.awt.headless=true");
    command.arg(format!("-Dlog4j2.configurationFile=file:{}", logging.display()));
    command.arg("-cp").arg(jars.join(":")).stdin(Stdio::null());
    command
}

impl Jvm {
    /// Starts it; it is not waited for.
    pub fn start(mut command: Command, log: PathBuf) -> Self {
        let file = fs::File::create(&log).expect("a log");
        let child = command.stdout(file.try_clone().expect("a log")).stderr(file).spawn().expect("java starts");
        let mut reap = Command::new("sh");
        reap.args(["-c", "cat >/dev/null; kill -9 \"$0\""]).arg(child.id().to_string());
        let reaper = reap.stdin(Stdio::piped()).stderr(Stdio::null()).spawn().expect("sh");
        Self { child, reaper, log }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until its log has these words.
    pub fn wait_for(&self, words: &str) {
        let started = Instant::now();
        while !self.says(words) {
            assert!(started.elapsed() < START_WITHIN, "no \"{words}\" in the log:\n{}", self.end());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// True when its log has these words.
    pub fn says(&self, words: &str) -> bool {
        fs::read_to_string(&self.log).unwrap_or_default().contains(words)
    }

    /// The end of its log.
    pub fn end(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }
}

impl Drop for Jvm {
    fn drop(&mut self) {
        drop(self.reaper.stdin.take());
        let _ = self.reaper.wait();
        let _ = self.child.wait();
    }
}
