//! The sources of every crate: no two files import each other, in a circle of any length, and no function is long. Tests inside of the
//! sources may be both.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use syn::spanned::Spanned;
use syn::visit::{self, Visit};

/// Lines of a function, its signature included.
const LINES: usize = 60;

/// Names of a module, from the root of its crate.
type Module = Vec<String>;

/// The files of a crate.
#[derive(Default)]
struct Crate {
    /// The file of each module, modules within a file included.
    modules: BTreeMap<Module, PathBuf>,
    /// What a module makes known under another name or place.
    exports: BTreeMap<(Module, String), Module>,
    /// Paths that are named in a module.
    named: Vec<(Module, Module)>,
    /// Functions and their lines.
    functions: Vec<(PathBuf, String, usize)>,
}

fn is_test(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|a| match &a.meta {
        syn::Meta::Path(path) => path.is_ident("test"),
        syn::Meta::List(list) => {
            list.path.is_ident("cfg") && ["test", "any (test , fuzzing)"].contains(&&*list.tokens.to_string())
        }
        syn::Meta::NameValue(_) => false,
    })
}

impl Crate {
    /// Parses a file and those of its modules.
    fn read(&mut self, file: &Path, module: Module) {
        let text = std::fs::read_to_string(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        let parsed = syn::parse_file(&text).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        self.items(file, &module, &parsed.items);
    }

    fn items(&mut self, file: &Path, module: &Module, items: &[syn::Item]) {
        self.modules.insert(module.clone(), file.to_owned());
        for item in items {
            match item {
                syn::Item::Mod(inner) if is_test(&inner.attrs) => {}
                syn::Item::Mod(inner) => {
                    let mut name = module.clone();
                    name.push(inner.ident.to_string());
                    match &inner.content {
                        Some((_, items)) => self.items(file, &name, items),
                        None => self.read(&file_of(file, module, &inner.ident.to_string()), name),
                    }
                }
                syn::Item::Use(import) if !is_test(&import.attrs) => {
                    let public = !matches!(import.vis, syn::Visibility::Inherited);
                    self.import(module, &import.tree, &mut Vec::new(), public);
                }
                item => Walk { krate: self, file, module }.visit_item(item),
            }
        }
    }

    fn import(&mut self, module: &Module, tree: &syn::UseTree, path: &mut Module, public: bool) {
        let mut named = |path: &Module, name: &syn::Ident, known_as: &syn::Ident| {
            let mut full = path.clone();
            if name != "self" {
                full.push(name.to_string());
            }
            if public {
                // A name that is not a module of this crate belongs to another one.
                let target = absolute(module, &full).unwrap_or_else(|| [module.as_slice(), &full].concat());
                self.exports.insert((module.clone(), known_as.to_string()), target);
            } else {
                self.named.push((module.clone(), full));
            }
        };
        match tree {
            syn::UseTree::Path(part) => {
                path.push(part.ident.to_string());
                self.import(module, &part.tree, path, public);
                path.pop();
            }
            syn::UseTree::Name(name) => named(path, &name.ident, &name.ident),
            syn::UseTree::Rename(renamed) => named(path, &renamed.ident, &renamed.rename),
            syn::UseTree::Glob(_) => self.named.push((module.clone(), path.clone())),
            syn::UseTree::Group(group) => group.items.iter().for_each(|tree| self.import(module, tree, path, public)),
        }
    }

    /// The module that a path leads to, through what modules export.
    fn resolve(&self, module: &Module, path: &Module) -> Option<&Module> {
        // A path may begin with a module of this one.
        let local: Module = [module.as_slice(), path].concat();
        let known = |path: &Module| path.len() > module.len() && self.modules.contains_key(&path[..=module.len()]);
        let mut target = absolute(module, path).or_else(|| known(&local).then_some(local))?;
        for _ in 0..16 {
            let (at, _) = (0..=target.len()).rev().find_map(|n| self.modules.get_key_value(&target[..n]))?;
            match target.get(at.len()).and_then(|next| self.exports.get(&(at.clone(), next.clone()))) {
                Some(export) => target = [export.as_slice(), &target[at.len() + 1..]].concat(),
                None => return Some(at),
            }
        }
        None
    }

    /// Which files each file needs.
    fn needs(&self) -> BTreeMap<&Path, BTreeSet<&Path>> {
        let mut needs: BTreeMap<&Path, BTreeSet<&Path>> = BTreeMap::new();
        for (module, path) in &self.named {
            if let Some(target) = self.resolve(module, path) {
                let (from, to) = (&*self.modules[module], &*self.modules[target]);
                if from != to {
                    needs.entry(from).or_default().insert(to);
                }
            }
        }
        needs
    }

    /// A circle of files for each file that lies on one.
    fn circles(&self) -> BTreeSet<String> {
        let needs = self.needs();
        let circle = |start: &Path| -> Option<Vec<String>> {
            let mut from: BTreeMap<&Path, &Path> = BTreeMap::new();
            let mut open = vec![start];
            while let Some(file) = open.pop() {
                for &next in needs.get(file).into_iter().flatten() {
                    if next == start {
                        let back = std::iter::successors(Some(file), |file| from.get(file).copied());
                        return Some(back.map(|file| file.display().to_string()).collect());
                    }
                    if let std::collections::btree_map::Entry::Vacant(fresh) = from.entry(next) {
                        fresh.insert(file);
                        open.push(next);
                    }
                }
            }
            None
        };
        let mut found = BTreeSet::new();
        for file in needs.keys() {
            if let Some(mut files) = circle(file) {
                files.sort();
                found.insert(files.join(" <-> "));
            }
        }
        found
    }
}

/// A path as from the root of the crate, where it says so.
fn absolute(module: &Module, path: &Module) -> Option<Module> {
    let mut at = match path.first()?.as_str() {
        "crate" => Vec::new(),
        "self" | "super" => module.clone(),
        _ => return None,
    };
    let mut rest = path.as_slice();
    while let Some(first) = rest.first().filter(|part| matches!(part.as_str(), "crate" | "self" | "super")) {
        if first == "super" {
            at.pop();
        }
        rest = &rest[1..];
    }
    at.extend_from_slice(rest);
    Some(at)
}

fn file_of(parent: &Path, module: &Module, name: &str) -> PathBuf {
    let folder = parent.parent().unwrap();
    let own = matches!(parent.file_name().and_then(|n| n.to_str()), Some("lib.rs" | "main.rs" | "mod.rs"));
    // The root of a program may have another name.
    let folder = if own || module.is_empty() { folder.to_owned() } else { folder.join(parent.file_stem().unwrap()) };
    let flat = folder.join(format!("{name}.rs"));
    if flat.exists() {
        flat
    } else {
        folder.join(name).join("mod.rs")
    }
}

/// Collects what an item names and how long its functions are.
struct Walk<'a> {
    krate: &'a mut Crate,
    file: &'a Path,
    module: &'a Module,
}

impl Walk<'_> {
    fn function(&mut self, name: &syn::Ident, signature: &syn::Signature, block: &syn::Block) {
        let lines = block.span().end().line - signature.span().start().line + 1;
        self.krate.functions.push((self.file.to_owned(), name.to_string(), lines));
    }
}

impl<'ast> Visit<'ast> for Walk<'_> {
    fn visit_item(&mut self, item: &'ast syn::Item) {
        let attributes: &[syn::Attribute] = match item {
            syn::Item::Fn(item) => &item.attrs,
            syn::Item::Impl(item) => &item.attrs,
            syn::Item::Struct(item) => &item.attrs,
            syn::Item::Const(item) => &item.attrs,
            _ => &[],
        };
        if !is_test(attributes) {
            visit::visit_item(self, item);
        }
    }

    fn visit_item_use(&mut self, import: &'ast syn::ItemUse) {
        self.krate.import(self.module, &import.tree, &mut Vec::new(), false);
    }

    fn visit_item_fn(&mut self, function: &'ast syn::ItemFn) {
        self.function(&function.sig.ident, &function.sig, &function.block);
        visit::visit_item_fn(self, function);
    }

    fn visit_impl_item_fn(&mut self, function: &'ast syn::ImplItemFn) {
        if !is_test(&function.attrs) {
            self.function(&function.sig.ident, &function.sig, &function.block);
            visit::visit_impl_item_fn(self, function);
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        if path.leading_colon.is_none() && path.segments.len() > 1 {
            let parts = path.segments.iter().map(|part| part.ident.to_string()).collect();
            self.krate.named.push((self.module.clone(), parts));
        }
        visit::visit_path(self, path);
    }
}

/// Every crate of the workspace.
fn crates() -> Vec<(String, Crate)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    let folders = std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path());
    for folder in folders.chain([root.to_owned(), root.join("soft-plugin/so")]) {
        let lib = folder.join("src/lib.rs");
        if folder.join("Cargo.toml").exists() && lib.exists() {
            let mut krate = Crate::default();
            krate.read(&lib, Vec::new());
            found.push((folder.display().to_string(), krate));
        }
    }
    found
}

#[test]
fn no_files_import_each_other() {
    let all = crates();
    assert!(all.len() > 5, "the crates of the workspace were not found");
    let needs: usize = all.iter().flat_map(|(_, krate)| krate.needs().into_values()).map(|files| files.len()).sum();
    assert!(needs > 300, "only {needs} imports were understood");
    let circles: Vec<String> = all.iter().flat_map(|(_, krate)| krate.circles()).collect();
    assert!(circles.is_empty(), "{} circles:\n{}", circles.len(), circles.join("\n"));
}

#[test]
fn no_function_is_long() {
    let all = crates();
    let functions = || all.iter().flat_map(|(_, krate)| &krate.functions);
    assert!(functions().count() > 1000, "the functions of the workspace were not found");
    let long: Vec<String> = functions()
        .filter(|(_, _, lines)| *lines > LINES)
        .map(|(file, name, lines)| format!("{}: {name} has {lines} lines", file.display()))
        .collect();
    assert!(long.is_empty(), "{} functions:\n{}", long.len(), long.join("\n"));
}

#[test]
fn a_circle_is_found_through_what_a_module_exports() {
    let folder = std::env::temp_dir().join(format!("layering-{}", std::process::id()));
    let write = |name: &str, text: &str| {
        let file = folder.join(name);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(file, text).unwrap();
    };
    write("lib.rs", "mod a; mod b; mod c;");
    write("a.rs", "mod one;\npub use one::One;\nuse std::fmt::Debug;");
    write("a/one.rs", "use crate::b;\npub struct One(b::Two);");
    write("b.rs", "pub struct Two;\nfn f() {\n    crate::c::make();\n}");
    write("c.rs", "use crate::a::One;\n#[cfg(test)]\nmod tests {\n    use crate::b;\n}\npub fn make() -> One { todo!() }");
    let mut krate = Crate::default();
    krate.read(&folder.join("lib.rs"), Vec::new());
    let name = |file: &str| folder.join(file).display().to_string();
    assert_eq!(krate.circles().into_iter().collect::<Vec<_>>(), [[name("a/one.rs"), name("b.rs"), name("c.rs")].join(" <-> ")]);
    assert!(krate.functions.contains(&(folder.join("b.rs"), "f".to_owned(), 3)));
    std::fs::remove_dir_all(folder).unwrap();
}
