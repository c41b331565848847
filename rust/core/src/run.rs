//! How a computation runs: on how many threads, and whether it should go on.

use crate::error::{Error, Result};
use crate::isa::InstructionSet;
use std::num::NonZero;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

/// How thresholds are found; all methods find the same.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Method {
    /// Whatever is fastest for the input.
    #[default]
    Fastest,
    /// By a sort of all samples.
    Sort,
}

/// How many threads a call may use, and how it learns that it should stop.
pub struct Run<'a> {
    threads: usize,
    method: Method,
    instruction_set: InstructionSet,
    interrupted: &'a dyn Fn() -> bool,
}

impl Run<'static> {
    /// Run on `threads` threads, or on all the process may use for 0, to the end.
    pub fn on(threads: usize) -> Self {
        Self::interruptible(threads, &|| false)
    }
}

impl<'a> Run<'a> {
    /// The same, but give up with [`Error::Interrupted`] soon after `interrupted` returns true.
    ///
    /// Only the calling thread asks, between pieces of work.
    pub fn interruptible(threads: usize, interrupted: &'a dyn Fn() -> bool) -> Self {
        let threads = match threads {
            0 => thread::available_parallelism().map_or(1, NonZero::get),
            threads => threads,
        };
        Self {
            threads,
            method: Method::default(),
            instruction_set: InstructionSet::best(),
            interrupted,
        }
    }

    /// Use this method, where it applies.
    pub fn with_method(self, method: Method) -> Self {
        Self { method, ..self }
    }

    /// Use these instructions.
    pub fn with_instruction_set(self, instruction_set: InstructionSet) -> Self {
        Self {
            instruction_set,
            ..self
        }
    }

    /// How thresholds are found.
    pub fn method(&self) -> Method {
        self.method
    }

    /// The instructions to use.
    pub fn instruction_set(&self) -> InstructionSet {
        self.instruction_set
    }

    /// How many threads there are to use.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// The error to return if the caller wants to stop.
    pub fn check(&self) -> Result<()> {
        if (self.interrupted)() {
            Err(Error::Interrupted)
        } else {
            Ok(())
        }
    }

    /// Run `work` on every task, on as many threads as there are tasks and permission; results in the tasks' order.
    pub fn map<T: Send, R: Send>(
        &self,
        tasks: Vec<T>,
        work: impl Fn(T) -> R + Sync,
    ) -> Result<Vec<R>> {
        let mut results: Vec<Option<R>> = tasks.iter().map(|_| None).collect();
        let tasks = tasks.into_iter().enumerate().collect();
        let done = self.fold(tasks, Vec::new, |done, (index, task)| {
            done.push((index, work(task)))
        })?;
        for (index, result) in done.into_iter().flatten() {
            results[index] = Some(result);
        }
        Ok(results.into_iter().flatten().collect())
    }

    /// Let each thread `work` tasks into a sum of its own, which it starts with `zero`; the sums in no order.
    ///
    /// The calling thread takes its share.  Threads are scoped: none outlives the call, none is kept, so a fork
    /// between calls is safe.  A thread the system refuses to start is done without.
    pub fn fold<T: Send, A: Send>(
        &self,
        tasks: Vec<T>,
        zero: impl Fn() -> A + Sync,
        work: impl Fn(&mut A, T) + Sync,
    ) -> Result<Vec<A>> {
        let helpers = self.threads.min(tasks.len()).saturating_sub(1);
        let queue = Mutex::new(tasks.into_iter());
        let stop = AtomicBool::new(false);
        // Poisoning cannot matter: a panicking `work` holds no lock, and its panic resurfaces at the scope's end.
        let next = || {
            if stop.load(Ordering::Relaxed) {
                return None;
            }
            queue.lock().unwrap_or_else(PoisonError::into_inner).next()
        };
        let help = || {
            let mut sum = zero();
            while let Some(task) = next() {
                work(&mut sum, task);
            }
            sum
        };
        thread::scope(|scope| {
            let handles: Vec<_> = (0..helpers)
                .map_while(|_| thread::Builder::new().spawn_scoped(scope, help).ok())
                .collect();
            let mut sum = zero();
            let mut verdict = self.check();
            while verdict.is_ok() {
                let Some(task) = next() else { break };
                work(&mut sum, task);
                verdict = self.check();
            }
            stop.store(verdict.is_err(), Ordering::Relaxed);
            let mut sums = vec![sum];
            for handle in handles {
                match handle.join() {
                    Ok(sum) => sums.push(sum),
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            verdict.map(|()| sums)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn results_keep_the_order_of_tasks() {
        for threads in [1, 2, 7] {
            let squares = Run::on(threads).map((0..100u64).collect(), |i| i * i);
            assert_eq!(squares, Ok((0..100).map(|i| i * i).collect()));
        }
        assert_eq!(Run::on(3).map(Vec::<u8>::new(), |i| i), Ok(vec![]));
    }

    #[test]
    fn an_interrupt_ends_the_work() {
        let asked = Cell::new(0);
        let interrupted = || asked.replace(asked.get() + 1) >= 3;
        let run = Run::interruptible(1, &interrupted);
        assert_eq!(run.map(vec![(); 1000], |()| ()), Err(Error::Interrupted));
        assert_eq!(asked.get(), 4);
    }
}
