//! F6: the command line. One file a verb; one place that turns a fault into a line and an exit code.

pub mod args;
pub mod demo;
mod deploy;
mod export;
mod import;
mod journal;
mod offset;
mod operator;
mod output;
mod parked;
mod pending;
mod plan;
mod progress;
mod resync;
mod run;
mod status;
mod topic;

use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use tracing::Instrument;

use crate::config::{self, Pipeline};
use crate::model::{Class, Code, Fault, FlowName, Result};
use crate::telemetry::line::FlatJson;
use args::{Cli, Common, LogFormat, Verb};
use output::Output;

/// Exit code for "there is something": pending changes, a blocking finding.
const EXIT_SOMETHING: u8 = 3;

/// Parses the arguments, does what they say, and returns the exit code: 0, 1, 2, 3 or 4 (`--help` says what each means).
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(usage) => {
            // clap prints help and version to stdout and mistakes to stderr, each with its exit code (0 or 2).
            let _ = usage.print();
            return ExitCode::from(u8::try_from(usage.exit_code()).unwrap_or(2));
        }
    };
    if let Err(fault) = start_log(&cli) {
        return end(&fault);
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return end(&Fault::new(Code::Io, format!("start of the runtime: {error}"))),
    };
    let code = match runtime.block_on(dispatch(&cli)) {
        Ok(code) => ExitCode::from(code),
        Err(fault) => end(&fault),
    };
    // A connection that hangs must not keep a finished command from ending.
    runtime.shutdown_background();
    code
}

/// Prints the one line of a fault and gives its exit code.
fn end(fault: &Fault) -> ExitCode {
    eprintln!("{fault}");
    ExitCode::from(fault.class().exit_code())
}

async fn dispatch(cli: &Cli) -> Result<u8> {
    let output = Output::new(cli.common.json);
    if let Verb::Demo(args) = &cli.verb {
        return Ok(u8::from(!demo::run(args, &output).await?));
    }
    let pipeline = match load(cli) {
        Ok(pipeline) => pipeline,
        Err(code) => return Ok(code),
    };
    let span = tracing::error_span!("sitepair", pipeline = pipeline.name);
    perform(cli, &pipeline, output).instrument(span).await
}

async fn perform(cli: &Cli, pipeline: &Pipeline, output: Output) -> Result<u8> {
    match &cli.verb {
        Verb::Demo(_) => Ok(0),
        Verb::Plan(args) => plan::run(&chosen(pipeline, &cli.common)?, args, output).await,
        Verb::Deploy(args) => deploy::deploy(&chosen(pipeline, &cli.common)?, args, output).await,
        Verb::Undeploy(args) => deploy::undeploy(&chosen(pipeline, &cli.common)?, args, output).await,
        Verb::Run(args) => run::run(pipeline, &cli.common, args).await,
        Verb::Status(args) => status::run(pipeline, &cli.common, args, output).await,
        Verb::Pending(args) => pending::run(pipeline, &cli.common, args, output).await,
        Verb::Offset(verb) => offset::run(pipeline, &cli.common, verb, output).await,
        Verb::Journal(args) => journal::run(pipeline, &cli.common, args, output).await,
        Verb::Resync(args) => resync::run(pipeline, &cli.common, args, output).await,
        Verb::Parked(verb) => parked::run(pipeline, &cli.common, verb, output).await,
        Verb::Topic(verb) => topic::run(pipeline, &cli.common, verb, output).await,
        Verb::Export(args) => export::run(pipeline, &cli.common, args, output).await,
        Verb::Import(args) => import::run(pipeline, &cli.common, args, output).await,
    }
}

/// Reads the pipeline file; prints every error that it holds, a line each.
fn load(cli: &Cli) -> std::result::Result<Pipeline, u8> {
    let (common, usage) = (&cli.common, Class::Usage.exit_code());
    let Some(path) = common.pipeline.as_deref() else {
        eprintln!(
            "{}",
            Fault::new(Code::Usage, "no pipeline file").remedy("name it by --pipeline FILE or SITEPAIR_PIPELINE")
        );
        return Err(usage);
    };
    // Only these verbs log in as `admin`; a daemon's user may not be able to read its password.
    let admin = matches!(cli.verb, Verb::Plan(_) | Verb::Deploy(_) | Verb::Undeploy(_) | Verb::Resync(_));
    let pipeline = read(path, admin)?;
    if let Some(site) = &common.site
        && !pipeline.sites.contains_key(site)
    {
        let known: Vec<_> = pipeline.sites.keys().map(String::as_str).collect();
        let fault = Fault::new(Code::Usage, format!("--site {site}: no such site in {}", path.display()));
        eprintln!("{}", fault.remedy(format!("the sites are: {}", known.join(", "))));
        return Err(usage);
    }
    Ok(pipeline)
}

fn read(path: &Path, admin: bool) -> std::result::Result<Pipeline, u8> {
    let overrides = config::Overrides { without_admin: !admin, ..config::Overrides::default() };
    config::load(path, &overrides).map_err(|problems| {
        for problem in &problems {
            eprintln!("{problem}");
        }
        Class::Usage.exit_code()
    })
}

/// The flows that `--flow` and the file name.
fn flows<'p>(pipeline: &'p Pipeline, common: &Common) -> Result<Vec<&'p FlowName>> {
    let chosen: Vec<_> = match &common.flow {
        None => pipeline.flows.iter().collect(),
        Some(name) => pipeline.flows.iter().filter(|flow| flow.to_string() == *name).collect(),
    };
    if chosen.is_empty() {
        let known: Vec<_> = pipeline.flows.iter().map(ToString::to_string).collect();
        let fault =
            Fault::new(Code::Usage, format!("--flow {}: no such flow", common.flow.as_deref().unwrap_or_default()));
        return Err(fault.remedy(format!("the flows are: {}", known.join(", "))));
    }
    Ok(chosen)
}

/// The pipeline with the flows that `--flow` names.
fn chosen(pipeline: &Pipeline, common: &Common) -> Result<Pipeline> {
    Ok(match (&common.flow, flows(pipeline, common)?.as_slice()) {
        (Some(_), [flow]) => pipeline.only(flow),
        _ => pipeline.clone(),
    })
}

/// The flow that a verb acts on, which must be one.
fn one_flow<'p>(pipeline: &'p Pipeline, common: &Common) -> Result<&'p FlowName> {
    match flows(pipeline, common)?.as_slice() {
        [flow] => Ok(flow),
        several => {
            let names: Vec<_> = several.iter().map(ToString::to_string).collect();
            let fault = Fault::new(Code::Usage, "the pipeline has more than one flow");
            Err(fault.remedy(format!("choose one by --flow: {}", names.join(", "))))
        }
    }
}

/// Log events go to stderr, so that stdout holds results only.
fn start_log(cli: &Cli) -> Result<()> {
    let common = &cli.common;
    let default = if matches!(cli.verb, Verb::Run(_)) { "info" } else { "warn" };
    let level = common.log_level.as_deref().unwrap_or(default);
    use tracing_subscriber::{EnvFilter, fmt};
    let filter = EnvFilter::try_new(level).map_err(|error| {
        Fault::new(Code::Usage, format!("--log-level {level}: {error}")).remedy("use error, warn, info, debug or trace")
    })?;
    let builder = fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    let started = match common.log_format {
        LogFormat::Text => builder.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).try_init(),
        LogFormat::Json => builder.json().event_format(FlatJson).try_init(),
    };
    started.map_err(|error| Fault::new(Code::Usage, format!("log: {error}")))
}
