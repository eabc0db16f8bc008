//! Dead letters of RabbitMQ, NATS JetStream or Redis: to list them, to move them back, and to delete them.
//!
//! ```sh
//! cargo run --all-features --example redrive -- --broker amqp://localhost orders.dead list
//! cargo run --all-features --example redrive -- --broker nats://localhost dead.jobs redrive --kind timed_out
//! cargo run --all-features --example redrive -- --broker redis://localhost '{jobs}:workers:dead' purge --older-than 30d
//! ```
//!
//! The argument is the queue, the subject or the stream of the dead letters. The address may be in the environment, as
//! `BROKER_ADDR`, so that no password is in the list of processes.
//!
//! `redrive` and `purge` ask before they begin, unless `--yes` is set. Ctrl-C ends a run after its batch; a second one
//! ends it at once. The exit code is 0 if the run came to its end and each letter that matches was moved or deleted, 3 if
//! some of them stayed, 130 after Ctrl-C, 1 after an error, and 2 for wrong arguments.

use std::{
    collections::BTreeMap,
    error::Error,
    io::{self, BufRead, IsTerminal, Write},
    ops::ControlFlow,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use clap::{Args, Parser, Subcommand};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;
use tower_sentinel::broker::{
    dead_letters::{DeadLetter, DeadLetters, Filter, Interrupted, Pass, Purge, Redrive, Tally},
    nats::{self, async_nats::jetstream},
    rabbitmq,
    redis::{self, redis::Client},
};
use tracing_subscriber::{EnvFilter, filter::LevelFilter};

type BoxError = Box<dyn Error + Send + Sync>;

/// Lists dead letters, moves them back, and deletes them.
#[derive(Debug, Parser)]
struct Options {
    /// Address of the broker: amqp://, nats:// or redis://
    #[arg(long, env = "BROKER_ADDR", hide_env_values = true)]
    broker: String,

    /// Queue, subject or stream of the dead letters
    dead_letters: String,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Lists the dead letters; they stay
    List {
        #[command(flatten)]
        choice: Choice,

        /// Number of letters to list
        #[arg(long, default_value_t = 50)]
        limit: usize,

        /// Counts the letters by kind, destination and message instead
        #[arg(long)]
        summary: bool,
    },
    /// Moves dead letters back to the place that they came from
    Redrive {
        #[command(flatten)]
        choice: Choice,

        #[command(flatten)]
        run: Run,

        /// Letters per second
        #[arg(long)]
        rate: Option<f64>,

        /// Moves all letters to this queue, subject or stream
        #[arg(long)]
        to: Option<String>,

        /// Times that a letter may be moved back
        #[arg(long, default_value_t = 3)]
        max_redrives: u32,

        /// Moves letters back however often that was done
        #[arg(long)]
        no_guard: bool,
    },
    /// Deletes dead letters for good
    Purge {
        #[command(flatten)]
        choice: Choice,

        #[command(flatten)]
        run: Run,

        /// Deletes all letters, if no filter is set
        #[arg(long)]
        all: bool,
    },
}

/// Filter; a letter has to meet each condition.
#[derive(Debug, Args)]
struct Choice {
    /// Kind of the outcome, such as failed, panicked, timed_out, or RabbitMQ's rejected, expired; may be repeated
    #[arg(long)]
    kind: Vec<String>,

    /// Text within the message; may be repeated
    #[arg(long)]
    message: Vec<String>,

    /// Place that it came from; may be repeated
    #[arg(long)]
    from: Vec<String>,

    /// Id, as listed; may be repeated
    #[arg(long)]
    id: Vec<String>,

    /// Least age, such as 90s, 15m, 2h, 30d
    #[arg(long, value_parser = age)]
    older_than: Option<Duration>,

    /// Greatest age
    #[arg(long, value_parser = age)]
    younger_than: Option<Duration>,

    /// Prints JSON, one value per line
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct Run {
    /// Greatest number of letters
    #[arg(long)]
    limit: Option<u64>,

    /// Letters that are taken at a time
    #[arg(long, default_value_t = 100, value_parser = batch)]
    batch: usize,

    /// Changes nothing, and only counts
    #[arg(long)]
    dry_run: bool,

    /// Does not ask
    #[arg(long)]
    yes: bool,
}

fn age(text: &str) -> Result<Duration, String> {
    let unit = text.trim_start_matches(|sign: char| sign.is_ascii_digit());
    let number = &text[..text.len() - unit.len()];
    let seconds = match unit {
        "s" | "" => 1,
        "m" => 60,
        "h" => 3_600,
        "d" => 86_400,
        _ => return Err("a number and one of s, m, h, d".to_owned()),
    };
    let number: u64 = number.parse().map_err(|_| "a number first".to_owned())?;
    let seconds = number.checked_mul(seconds).ok_or("too long")?;
    Ok(Duration::from_secs(seconds))
}

fn batch(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err("a number above 0".to_owned()),
        Ok(batch) => Ok(batch),
    }
}

impl Choice {
    fn filter(&self) -> Filter {
        let mut filter = Filter::all();
        for kind in &self.kind {
            filter = filter.kind(kind);
        }
        for message in &self.message {
            filter = filter.message(message);
        }
        for destination in &self.from {
            filter = filter.destination(destination);
        }
        for id in &self.id {
            filter = filter.id(id);
        }
        if let Some(age) = self.older_than {
            filter = filter.older_than(age);
        }
        if let Some(age) = self.younger_than {
            filter = filter.younger_than(age);
        }
        filter
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let options = Options::parse();
    let filter = EnvFilter::builder().with_default_directive(LevelFilter::WARN.into());
    tracing_subscriber::fmt()
        .with_env_filter(filter.from_env_lossy())
        .with_writer(io::stderr)
        .init();
    match connect(&options).await {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {}", line(&*error));
            ExitCode::FAILURE
        }
    }
}

/// Returns an error and its causes as one line.
fn line(error: &(dyn Error + 'static)) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line += &format!(": {error}");
        cause = error.source();
    }
    line.replace('\n', " ")
}

/// Connects to the broker that the address names.
async fn connect(options: &Options) -> Result<ExitCode, BoxError> {
    let (address, place) = (&options.broker, &options.dead_letters);
    let scheme = address.split("://").next().unwrap_or_default();
    match scheme {
        "amqp" | "amqps" => {
            let connection = rabbitmq::connect(address).await?;
            let letters = rabbitmq::DeadLetterQueue::new(&connection, place);
            let code = run(options, letters).await;
            drop(connection.close(200, "OK".into()).await);
            code
        }
        "nats" | "tls" => {
            let context = jetstream::new(nats::connect(address).await?);
            run(options, nats::DeadLetterQueue::new(&context, place)).await
        }
        "redis" | "rediss" | "valkey" | "valkeys" | "unix" => {
            // Its error may repeat a part of the address.
            let client = Client::open(&**address);
            let client = client.map_err(|_| "the address of the redis server is not valid")?;
            let server = client.get_connection_info().addr().to_string();
            let connected = client.get_multiplexed_async_connection().await;
            let connection = connected
                .map_err(|error| format!("redis at {server} can't be reached: {error}"))?;
            run(options, redis::DeadLetterQueue::new(connection, place)).await
        }
        _ => Err("the address begins with none of amqp://, nats:// and redis://".into()),
    }
}

async fn run<D>(options: &Options, letters: D) -> Result<ExitCode, BoxError>
where
    D: DeadLetters<Pass: Pass> + Sync,
{
    match &options.command {
        Command::List {
            choice,
            limit,
            summary,
        } => {
            let limit = if *summary { usize::MAX } else { *limit };
            let letters = letters.list(&choice.filter(), limit).await?;
            match summary {
                true => print_summary(&letters, choice.json)?,
                false => print_letters(&letters, choice.json)?,
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Redrive {
            choice,
            run,
            rate,
            to,
            max_redrives,
            no_guard,
        } => {
            if rate.is_some_and(|rate| !(rate.is_finite() && rate > 0.0)) {
                eprintln!("error: --rate is a number above 0");
                return Ok(ExitCode::from(2));
            }
            if !agreed(run, "move back")? {
                return Ok(ExitCode::from(130));
            }
            let mut redrive = Redrive::new(choice.filter()).batch(run.batch);
            redrive = redrive.max_redrives((!no_guard).then_some(*max_redrives));
            if let Some(rate) = rate {
                redrive = redrive.rate(*rate);
            }
            if let Some(to) = to {
                redrive = redrive.destination(to);
            }
            if let Some(limit) = run.limit {
                redrive = redrive.limit(limit);
            }
            if run.dry_run {
                redrive = redrive.dry_run();
            }
            let watch = Watch::start(choice.json, "moved");
            let ended = redrive.run_with(&letters, |tally| watch.show(tally, tally.moved));
            let ended = ended.await;
            watch.finish(ended, run.dry_run)
        }
        Command::Purge { choice, run, all } => {
            if choice.filter() == Filter::all() && !all {
                eprintln!("error: set a filter, or --all");
                return Ok(ExitCode::from(2));
            }
            if !agreed(run, "delete")? {
                return Ok(ExitCode::from(130));
            }
            let mut purge = Purge::new(choice.filter()).batch(run.batch);
            if let Some(limit) = run.limit {
                purge = purge.limit(limit);
            }
            if run.dry_run {
                purge = purge.dry_run();
            }
            let watch = Watch::start(choice.json, "deleted");
            let ended = purge.run_with(&letters, |tally| watch.show(tally, tally.deleted));
            let ended = ended.await;
            watch.finish(ended, run.dry_run)
        }
    }
}

/// Asks before a run, unless that was answered by `--yes`.
fn agreed(run: &Run, what: &str) -> Result<bool, BoxError> {
    if run.yes || run.dry_run {
        return Ok(true);
    }
    if !io::stdin().is_terminal() {
        return Err("nobody is there to be asked: set --yes or --dry-run".into());
    }
    eprint!("{what} the dead letters that match? [y/N] ");
    io::stderr().flush()?;
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "yes"))
}

// === progress ===

/// Progress of a run, and its end by Ctrl-C.
struct Watch {
    bar: ProgressBar,
    is_json: bool,
    word: &'static str,
    is_interrupted: Arc<AtomicBool>,
}

impl Watch {
    fn start(is_json: bool, word: &'static str) -> Self {
        let target = match is_json {
            true => ProgressDrawTarget::hidden(),
            false => ProgressDrawTarget::stderr(),
        };
        let bar = ProgressBar::with_draw_target(None, target);
        let style =
            ProgressStyle::with_template("{bar:40} {pos}/{len} seen, {msg}, {per_sec}, {eta} left");
        bar.set_style(style.expect("the template is valid"));
        let is_interrupted = Arc::new(AtomicBool::new(false));
        let interrupted = Arc::clone(&is_interrupted);
        tokio::spawn(async move {
            while tokio::signal::ctrl_c().await.is_ok() {
                if interrupted.swap(true, Ordering::Relaxed) {
                    std::process::exit(130);
                }
                eprintln!("ends after this batch; Ctrl-C again ends it at once");
            }
        });
        Self {
            bar,
            is_json,
            word,
            is_interrupted,
        }
    }

    /// Shows the numbers so far, and tells whether to go on.
    fn show(&self, tally: &Tally, done: u64) -> ControlFlow<()> {
        if self.is_json {
            // Its end is noticed at the last line.
            drop(print(&numbers(tally, "progress")));
        }
        self.bar.set_length(tally.total);
        self.bar.set_position(tally.seen);
        self.bar.set_message(format!("{done} {}", self.word));
        match self.is_interrupted.load(Ordering::Relaxed) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }

    /// Prints the numbers of the end.
    fn finish<E: Error + 'static>(
        self,
        ended: Result<Tally, Interrupted<E>>,
        is_dry: bool,
    ) -> Result<ExitCode, BoxError> {
        self.bar.finish_and_clear();
        let (tally, error) = match ended {
            Ok(tally) => (tally, None),
            Err(interrupted) => (interrupted.tally, Some(line(&interrupted))),
        };
        match self.is_json {
            true => print(&numbers(&tally, "end"))?,
            false => {
                let would = if is_dry { "would be " } else { "" };
                let done = tally.moved + tally.deleted;
                print(&format!(
                    "{done} of {} dead letters {would}{}; {} do not match, {} moved back too often, \
                     {} without a destination, {} gone; {} left",
                    tally.total,
                    self.word,
                    tally.skipped,
                    tally.refused,
                    tally.unroutable,
                    tally.gone,
                    tally.left(),
                ))?;
            }
        }
        Ok(match error {
            Some(error) => {
                eprintln!("error: {error}");
                ExitCode::FAILURE
            }
            None if self.is_interrupted.load(Ordering::Relaxed) => ExitCode::from(130),
            None if tally.refused + tally.unroutable > 0 => ExitCode::from(3),
            None => ExitCode::SUCCESS,
        })
    }
}

fn numbers(tally: &Tally, event: &str) -> String {
    json!({
        "event": event,
        "total": tally.total,
        "seen": tally.seen,
        "moved": tally.moved,
        "deleted": tally.deleted,
        "skipped": tally.skipped,
        "refused": tally.refused,
        "unroutable": tally.unroutable,
        "gone": tally.gone,
        "left": tally.left(),
    })
    .to_string()
}

// === output ===

fn print(line: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()
}

fn print_letters(letters: &[DeadLetter], is_json: bool) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if !is_json {
        writeln!(
            out,
            "{:<20} {:<14} {:>8} {:>4} {:>8} {:<20} MESSAGE",
            "ID", "KIND", "AGE", "RUNS", "REDRIVEN", "FROM"
        )?;
    }
    for letter in letters {
        let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "-".to_owned());
        let line = match is_json {
            true => json!({
                "id": letter.id,
                "kind": letter.kind,
                "message": letter.message,
                "time": letter.time.and_then(since_1970).map(|it| it.as_secs()),
                "deliveries": letter.deliveries,
                "destination": letter.destination,
                "redriven": letter.redriven,
            })
            .to_string(),
            false => format!(
                "{:<20} {:<14} {:>8} {:>4} {:>8} {:<20} {}",
                text(&letter.id),
                text(&letter.kind),
                letter.time.map_or("-".to_owned(), age_of),
                letter
                    .deliveries
                    .map_or("-".to_owned(), |it| it.to_string()),
                letter.redriven,
                text(&letter.destination),
                first_line(&text(&letter.message)),
            ),
        };
        writeln!(out, "{line}")?;
    }
    Ok(())
}

fn print_summary(letters: &[DeadLetter], is_json: bool) -> io::Result<()> {
    let mut counts = BTreeMap::<_, u64>::new();
    for letter in letters {
        let key = (&letter.kind, &letter.destination, &letter.message);
        *counts.entry(key).or_default() += 1;
    }
    let mut counts: Vec<_> = counts.into_iter().collect();
    counts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let mut out = io::stdout().lock();
    for ((kind, destination, message), count) in counts {
        let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "-".to_owned());
        let line = match is_json {
            true => json!({
                "count": count,
                "kind": kind,
                "destination": destination,
                "message": message,
            })
            .to_string(),
            false => format!(
                "{count:>8} {:<14} {:<20} {}",
                text(kind),
                text(destination),
                first_line(&text(message))
            ),
        };
        writeln!(out, "{line}")?;
    }
    Ok(())
}

/// Returns the beginning of a message without signs that move a terminal's cursor.
fn first_line(message: &str) -> String {
    let line = message.chars().map(|sign| match sign.is_control() {
        true => ' ',
        false => sign,
    });
    line.take(100).collect()
}

fn since_1970(time: SystemTime) -> Option<Duration> {
    time.duration_since(SystemTime::UNIX_EPOCH).ok()
}

fn age_of(time: SystemTime) -> String {
    // A clock may be behind that of the server.
    let seconds = time.elapsed().unwrap_or_default().as_secs();
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7_200 => format!("{} min", seconds / 60),
        7_200..172_800 => format!("{} h", seconds / 3_600),
        _ => format!("{} d", seconds / 86_400),
    }
}
